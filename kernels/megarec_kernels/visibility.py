"""What a token sees of its own history, where that is not simply everything before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megarec_kernels.tiles import Tile, TilePlan


@dataclass(frozen=True, kw_only=True, eq=False)  # a plan keeps what it made for one, by identity
class Visibility:
    """Token i of a history sees its tokens `j < seen_before_i` and its tokens `group_first_i <= j <= i`.

    Tokens are numbered from 0 within their history. One whose `seen_before` passes i + 1 sees later ones.

    Attributes:
        seen_before: `[T]` int64, at most the length of the history.
        group_first: `[T]` int64, from 0 to i.
        place: `[T]` int64, from 0: a position bias reads the distance `max(place_i - place_j, 0)`.
    """

    seen_before: Tensor
    group_first: Tensor
    place: Tensor

    def seen(self, tile: Tile, block: tuple[int, int, int]) -> Tensor:
        """Whether the queries of a block (first query, last, keys) see its keys: `[num_users, rows, keys]`."""
        first, last, num_keys = block
        token = tile.query_token[:, first:last]
        key = torch.arange(num_keys, device=token.device)
        in_group = (key >= self.group_first[token].unsqueeze(2)) & (key <= key[first:last].unsqueeze(1))
        return in_group | (key < self.seen_before[token].unsqueeze(2))

    def distance(self, tile: Tile, block: tuple[int, int, int]) -> Tensor:
        """Distances from the queries of a block to its keys, 0 to later ones, `[num_users, rows, keys]`."""
        first, last, num_keys = block
        place = self.place[tile.query_token]
        return (place[:, first:last, None] - place[:, None, :num_keys]).clamp_(min=0)


def candidate_suffix(cu_seqlens: Tensor, num_candidates: Tensor, *, group: int, num_tokens: int) -> Visibility:
    """Histories that end with candidates, which see the history and themselves, but no other candidate.

    All candidates of a history have the places that follow it: the distances of a candidate are those it would have if
    it were the only one.

    Source: HSTU (arXiv 2402.17152), M-FALCON; the mask of the public production code, where a candidate is one token.

    Args:
        cu_seqlens: `[B + 1]`, where each history begins, its candidates included, in tokens.
        num_candidates: `[B]` int64, candidates at the end of each history.
        group: tokens of a candidate; each sees those before it in its own candidate.
        num_tokens: T; the tokens behind the last history are dead.

    Raises:
        ValueError: a history is shorter than its candidates.
    """
    lengths, num_behind = cu_seqlens.diff().long(), num_candidates * group
    if num_behind.shape != lengths.shape or bool((num_behind > lengths).any()) or bool((num_behind < 0).any()):
        raise ValueError("num_candidates must be [B], and no history shorter than its candidates")
    index, length = _number(cu_seqlens, num_tokens)
    of_tokens = torch.repeat_interleave(num_behind, lengths)
    num_before = length - torch.cat([of_tokens, of_tokens.new_zeros(num_tokens - len(of_tokens))])
    within = index - num_before
    is_candidate = within >= 0
    return Visibility(
        seen_before=torch.where(is_candidate, num_before, index + 1),
        group_first=torch.where(is_candidate, index - within % group, index),
        place=torch.where(is_candidate, num_before + within % group, index),
    )


def semi_local(cu_seqlens: Tensor, *, num_first: int, num_last: int, num_tokens: int) -> Visibility:
    """Histories of which a token sees the first `num_first` tokens and the last `num_last`, itself among them.

    Attention then costs `num_first + num_last` pairs per token, however long a history is.

    Source: ULTRA-HSTU (arXiv 2602.16986), semi-local attention.

    Args:
        cu_seqlens: `[B + 1]`, where each history begins, in tokens.
        num_first: tokens that all later ones see.
        num_last: at least 1.
        num_tokens: T; the tokens behind the last history are dead.

    Raises:
        ValueError: a number is too small.
    """
    if num_first < 0 or num_last < 1:
        raise ValueError(f"num_first must be at least 0 and num_last at least 1, got {num_first} and {num_last}")
    index, _ = _number(cu_seqlens, num_tokens)
    return Visibility(
        seen_before=(index + 1).clamp(max=num_first), group_first=(index - num_last + 1).clamp(min=0), place=index
    )


def contextual_prefix(cu_seqlens: Tensor, *, num_prefix: int, num_tokens: int) -> Visibility:
    """Histories whose first `num_prefix` tokens see all of it, later ones too; the others see what is before them.

    Through a second layer every token then knows all of its history: for a model that predicts nothing of it.

    Source: the contextual features of the public production code of HSTU.
    """
    if num_prefix < 0:
        raise ValueError(f"num_prefix must be at least 0, got {num_prefix}")
    index, length = _number(cu_seqlens, num_tokens)
    return Visibility(
        seen_before=torch.where(index < num_prefix, length, index + 1), group_first=torch.zeros_like(index), place=index
    )


def _number(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The number of each token in its history and the length of that, `[T]` int64; the dead are one more history."""
    bounds = torch.cat([cu_seqlens.long(), cu_seqlens.new_full((1,), num_tokens).long()])
    length = torch.repeat_interleave(bounds.diff(), bounds.diff())
    return torch.arange(num_tokens, device=bounds.device) - torch.repeat_interleave(bounds[:-1], bounds.diff()), length


def check_visibility(visibility: Visibility, plan: TilePlan) -> tuple[int, bool]:
    """Refuses a visibility that is of other histories, or in which a token sees more than its own.

    Returns:
        one more than the last place of a living token, and whether any token sees a later one.

    Raises:
        ValueError: names what is wrong.
    """
    index, lengths = _number(plan.cu_seqlens, plan.num_tokens)
    for name, value in vars(visibility).items():
        if value.dtype != torch.int64 or value.dim() != 1 or len(value) < len(index):
            raise ValueError(f"visibility.{name} must be int64 [T], got {value.dtype} {list(value.shape)}")
    seen_before, group_first, place = (value[: len(index)] for value in vars(visibility).values())
    if bool((seen_before > lengths).any()) or bool((group_first > index).any()):
        raise ValueError("visibility lets a token see more than its history, or hides it from itself")
    if not len(index):
        return 0, False
    if min(int(seen_before.min()), int(group_first.min()), int(place.min())) < 0:
        raise ValueError("visibility has a negative number")
    return int(place.max()) + 1, bool((seen_before > index + 1).any())
