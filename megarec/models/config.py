"""What the settings of every model have in common. Imports no torch."""

from dataclasses import dataclass, field

from megarec.base.errors import UserError
from megarec.layers.config import TOKENS_PER_EVENT, HeadsConfig, TokenLayout, require_positive


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """A model of event histories: what it reads, how wide and deep it is, what it predicts.

    Attributes:
        input_fields: the dataset fields that enter the history; None: all of them.
        prefix_fields: context fields that stand before the history as tokens of their own, one a field, with the value
            of the window's first event: what is known of the user. They leave the tokens of the events.
        item_fields: the fields whose rows make an item vector, of role item or item_side; None: all of them.
        tie_item_tables: histories and item vectors share the rows of the item and its side fields; if not, item
            vectors have tables of their own, and an item may follow another without being like it.
        feedback_heads: the feedback fields to predict; None: every single-valued one with two values or more.
        time_gap_buckets: adds a context field `time_gap`, the log2 bucket of the seconds since the event before;
            0: none.
        token_layout: one token per event (`fused`), item and action tokens, or context, item and feedback tokens.
        width: width of the states.
        table_width: width of a table row; a linear map leads to `width` where they differ.
        num_layers: number of blocks.
        max_positions: the longest history the model can read, in events.
        position_embedding: adds a learned vector per position in the history to the input.
        dropout: probability to drop a channel, on the input and in every block.
        heads: what is read off the states.
    """

    input_fields: tuple[str, ...] | None = None
    prefix_fields: tuple[str, ...] = ()
    item_fields: tuple[str, ...] | None = None
    tie_item_tables: bool = True
    feedback_heads: tuple[str, ...] | None = None
    time_gap_buckets: int = 0
    token_layout: TokenLayout = "fused"
    width: int = 64
    table_width: int = 64
    num_layers: int = 2
    max_positions: int = 512
    position_embedding: bool = True
    dropout: float = 0.0
    heads: HeadsConfig = field(default_factory=HeadsConfig)

    def __post_init__(self) -> None:
        require_positive(self, "width", "table_width", "num_layers", "max_positions")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"{self.dropout} is not in [0, 1)", where="dropout")
        if self.time_gap_buckets < 0:
            raise UserError(f"{self.time_gap_buckets} is negative", where="time_gap_buckets")
        if len(set(self.prefix_fields)) != len(self.prefix_fields):
            raise UserError("a field stands there twice", where="prefix_fields", fix="Name it once")
        if not self.heads.query_context and self.heads.query_width != self.width:
            raise UserError(
                f"the state is the query, but is {self.width} wide and not {self.heads.query_width}",
                where="heads.query_width",
                fix="Set it to model.width, or query_context=true",
            )
        if self.heads.query_residual and (not self.heads.query_context or self.heads.query_width != self.width):
            raise UserError(
                "the state is added to the query, so they have one width and the query reads the context",
                where="heads.query_residual",
                fix="Set query_width to model.width and query_context=true",
            )
        if self.heads.item_tower == "none" and self.heads.query_width != self.table_width:
            raise UserError(
                f"a table row is the item vector, but is {self.table_width} wide and not {self.heads.query_width}",
                where="heads.query_width",
                fix="Set it to model.table_width, or item_tower=linear",
            )

    @property
    def tokens_per_event(self) -> int:
        """How many tokens the layout makes of one event."""
        return TOKENS_PER_EVENT[self.token_layout]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first event of a history."""
        return len(self.prefix_fields)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest history the model can read."""
        return self.num_prefix_tokens + self.max_positions * self.tokens_per_event

    @property
    def keep_last_event(self) -> bool:
        """Whether packs must hold a history's last event: layouts that read feedback at the next event's item token."""
        return self.token_layout != "fused"


def require_whole_heads(width: int, num_heads: int) -> None:
    """Refuses heads that do not share the width evenly.

    Raises:
        UserError: names the setting.
    """
    if width % num_heads:
        raise UserError(f"width {width} is not a multiple of num_heads {num_heads}", where="block.num_heads")
