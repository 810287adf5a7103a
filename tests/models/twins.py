"""ARGUS and HSTU written once more from their equations: one user at a time, dense, no code of the package."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec.models.argus.config import ArgusConfig
from megarec.models.choice import ModelConfig
from megarec.models.shape import FieldSlots, InputShape
from tests.models.small_log import SmallLog


class Twin:
    """The equations on copies of a model's parameters `p` and of its tables."""

    def __init__(self, config: ModelConfig, shape: InputShape, log: SmallLog, params: dict[str, Tensor], table: Tensor):
        self.config, self.shape, self.log = config, shape, log
        self.p = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        self.table = table.detach().clone().requires_grad_()

    def sum_of(self, slots: tuple[FieldSlots, ...], user: int, event: int) -> Tensor:
        """E_c, E_i or E_f of one event."""
        total = torch.zeros(self.config.table_width, dtype=torch.float64)
        for f in slots:
            for row in self.log.rows(f.name, user, event, self.shape):
                if row >= 0:
                    total = total + self.table[row]
        return total

    def states(self, user: int) -> Tensor:
        """The states of all tokens of all events of a user, `[n * k, D]`."""
        shape, layout = self.shape, self.config.token_layout
        times_of = [int(t) for t in self.log.time[user]]
        tokens = [self.token(self.sum_of((field,), user, 0)) for field in shape.prefix]
        times, asked = [times_of[0]] * len(tokens), [times_of[0]] * len(tokens)
        for t in range(self.log.lengths[user]):
            c, i, f = (self.sum_of(slots, user, t) for slots in (shape.context, shape.item, shape.feedback))
            kinds = {"fused": [c + i + f], "item_action": [c + i, f], "context_item_feedback": [c, i, f]}[layout]
            for number, kind in enumerate(kinds):
                tokens.append(self.token(kind, t))
                times.append(times_of[t])
                last = number == len(kinds) - 1 and t + 1 < len(times_of)
                asked.append(times_of[t + 1] if last else times_of[t])
        x = torch.stack(tokens)
        for layer in range(self.config.num_layers):
            x = self.block(f"blocks.{layer}.", x, times, asked)
        if isinstance(self.config, ArgusConfig):
            x = F.layer_norm(x, x.shape[1:], self.p["final_norm.scale"], self.p["final_norm.shift"], 1e-6)
        return x[len(shape.prefix) :]

    def token(self, kind: Tensor, position: int | None = None) -> Tensor:
        x = kind
        if "input_map.weight" in self.p:
            x = self.p["input_map.weight"] @ x
        if not isinstance(self.config, ArgusConfig) and self.config.scale_input:
            x = x * math.sqrt(self.config.width)
        known = self.config.position_embedding and position is not None
        return x + self.p["position.weight"][position] if known else x

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
        return y * self.p[f"{name}.scale"] + self.p[f"{name}.shift"] if f"{name}.scale" in self.p else y

    def head_norm(self, name: str, x: Tensor, head: int) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return y * self.p[f"{name}.scale"][head] + self.p[f"{name}.shift"][head] if f"{name}.scale" in self.p else y

    def block(self, name: str, x: Tensor, times: list[int], asked: list[int]) -> Tensor:
        if isinstance(self.config, ArgusConfig):
            return self.transformer_block(name, x)
        return self.hstu_block(name, x, times, asked)

    def transformer_block(self, name: str, x: Tensor) -> Tensor:
        n, heads = len(x), self.config.block.num_heads
        width = self.config.width // heads
        qkv = self.linear(f"{name}qkv", self.norm(f"{name}attention_norm", x)).view(n, heads, 3, width)
        outs = []
        for head in range(heads):
            q, k, v = qkv[:, head].unbind(1)
            scores = (q @ k.T) / math.sqrt(width)
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            outs.append(torch.softmax(scores, dim=1) @ v)
        x = x + self.linear(f"{name}attention_out", torch.cat(outs, dim=1))
        hidden = F.gelu(self.linear(f"{name}up", self.norm(f"{name}feed_forward_norm", x)))
        return x + self.linear(f"{name}down", hidden)

    def hstu_block(self, name: str, x: Tensor, times: list[int], asked: list[int]) -> Tensor:
        block, n = self.config.block, len(x)
        mixed = self.linear(f"{name}uvqk", self.norm(f"{name}norm", x))
        per_head = mixed.view(n, block.num_heads, -1)
        bias = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(i + 1):
                if block.position_bias:
                    bias[i, j] += self.p[f"{name}position_bias"][i - j]
                if block.num_time_buckets:
                    bucket = int(math.log(max(1, abs(asked[i] - times[j]))) / 0.301)
                    bias[i, j] += self.p[f"{name}time_bias"][min(bucket, block.num_time_buckets)]
        us, attentions = [], []
        for head in range(block.num_heads):
            widths = [block.v_head_width, block.v_head_width, block.qk_head_width, block.qk_head_width]
            u, v, q, k = per_head[:, head].split(widths, dim=1)
            u = F.silu(u)
            if block.silu_on == "uvqk":
                v, q, k = F.silu(v), F.silu(q), F.silu(k)
            scores = q @ k.T / (math.sqrt(block.qk_head_width) if block.scale == "inverse_sqrt_width" else 1.0)
            weights = F.silu(scores + bias).tril()
            us.append(u)
            attentions.append(weights @ v / block.scaling_events)
        if block.output_norm == "all_heads":
            normed = self.norm(f"{name}output_norm", torch.cat(attentions, dim=1)).chunk(block.num_heads, dim=1)
        else:
            normed = [self.head_norm(f"{name}output_norm", a, head) for head, a in enumerate(attentions)]
        gates = []
        for u, a, norm in zip(us, attentions, normed, strict=True):
            gates += {"none": [], "u_and_norm": [u, norm], "u_and_attention": [u, a]}[block.concat] + [u * norm]
        return x + self.linear(f"{name}out", torch.cat(gates, dim=1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.mlp.out", F.gelu(self.linear(f"{name}.mlp.hidden", x)))

    def query(self, states: Tensor, user: int, event: int) -> Tensor:
        """q_t for the item of event t + 1."""
        per_event = self.config.tokens_per_event
        query = states[(event + 1) * per_event - 1]
        if self.config.heads.query_context:
            context = [self.sum_of(self.shape.context, user, event + 1)] if self.shape.context else []
            answer = self.mlp("query", torch.cat([query, *context]))
            query = query + answer if self.config.heads.query_residual else answer
        return self.unit(query)

    def feedback(self, states: Tensor, user: int, event: int) -> Tensor:
        """The logits of all heads for event t + 1, end to end."""
        per_event, fields = self.config.tokens_per_event, [self.shape.context, self.shape.item]
        product = self.config.heads.feedback_head == "product_swish"
        state = states[event] if per_event == 1 else states[(event + 1) * per_event + per_event - 2]
        if per_event > 1:
            fields = [self.shape.item] if product else []
        known = [self.sum_of(slots, user, event + 1) for slots in fields if slots]
        if not product:
            return self.mlp("feedback", torch.cat([state, *known]))
        item = self.swish_mlp("feedback.product.item", torch.cat(known))
        by_item = self.norm("feedback.product.state_norm", state, 1e-5) * self.norm(
            "feedback.product.item_norm", item, 1e-5
        )
        return self.swish_mlp("feedback.mlp", by_item)

    def swish_mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.hidden", x)
        gate = torch.sigmoid(self.norm(f"{name}.activation.norm", hidden, 1e-5))
        return self.linear(f"{name}.out", hidden * gate)

    def item(self, user: int, event: int) -> Tensor:
        """The item vector of the item of an event."""
        x = self.sum_of(self.shape.item_tower, user, event)
        if self.config.heads.item_tower == "linear":
            x = self.linear("item_tower.map", x)
        elif self.config.heads.item_tower == "mlp":
            x = self.linear("item_tower.map.out", F.gelu(self.linear("item_tower.map.hidden", x)))
        return self.unit(x)

    def unit(self, x: Tensor) -> Tensor:
        return x / x.norm().clamp(min=1e-6) if self.config.heads.normalize else x

    def inverse_temperature(self) -> Tensor:
        if self.config.heads.learn_temperature:
            return self.p["temperature.log_inverse"][0].exp().clamp(0.01, 100.0)
        return torch.tensor(1.0 / self.config.heads.temperature, dtype=torch.float64)
