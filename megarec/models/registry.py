"""The models by their settings: what is built, and what a step of it costs."""

import numpy as np

from megarec.base.jagged import Int64
from megarec.models.argus.config import ArgusConfig
from megarec.models.argus.flops import block_flops as argus_block_flops
from megarec.models.argus.model import Argus
from megarec.models.choice import ModelConfig
from megarec.models.flops import PackFlops, begin_flops, count_pairs, end_flops
from megarec.models.hstu.flops import block_flops as hstu_block_flops
from megarec.models.hstu.model import Hstu
from megarec.models.model import RecModel
from megarec.models.sasrec.config import SasrecConfig
from megarec.models.sasrec.flops import block_flops as sasrec_block_flops
from megarec.models.sasrec.model import Sasrec
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts
from megarec.parallel.placement import name_parameters
from megarec.parallel.stages import Stage


def build_model(config: ModelConfig, shape: InputShape, parts: Parts, stage: Stage | None = None) -> RecModel:
    """The model that `config` describes, or the piece of it that `stage` names.

    Its parameters are named and placed; `placement.initialize` fills them.
    """
    stage = stage or Stage(layers=range(config.num_layers))
    if isinstance(config, ArgusConfig):
        model: RecModel = Argus(config, shape, parts, stage)
    elif isinstance(config, SasrecConfig):
        model = Sasrec(config, shape, parts, stage)
    else:
        model = Hstu(config, shape, parts, stage)
    name_parameters(model)
    return model


def pack_flops(
    config: ModelConfig,
    shape: InputShape,
    cu_seqlens: Int64,
    *,
    num_item_vectors: int,
    num_scores: int,
    num_candidates: Int64 | None = None,
) -> PackFlops:
    """Floating-point operations of one training pass over one pack, counted as `megarec.models.flops` says.

    Args:
        config: the settings of the model.
        shape: its input and output.
        cu_seqlens: `[B + 1]`, where each history of the pack begins, in events.
        num_item_vectors: those that are made: of the distinct targets and negatives.
        num_scores: pairs of query and item vector that are scored: targets times candidates, unless every target
            has negatives of its own.
        num_candidates: `[B]`, how many events at the end of each history are candidates; None: none.
    """
    per_event = config.tokens_per_event
    lengths = np.diff(cu_seqlens) * per_event + config.num_prefix_tokens
    candidates = np.zeros_like(lengths) if num_candidates is None else num_candidates
    num_tokens, num_pairs = int(lengths.sum()), count_pairs(lengths, candidates, per_event=per_event)
    if isinstance(config, ArgusConfig):
        layer = argus_block_flops(config, num_tokens=num_tokens, num_pairs=num_pairs)
    elif isinstance(config, SasrecConfig):
        layer = sasrec_block_flops(config, num_tokens=num_tokens, num_pairs=num_pairs)
    else:
        layer = hstu_block_flops(config, num_tokens=num_tokens, num_pairs=num_pairs)
    end = end_flops(
        config, shape, num_events=int(cu_seqlens[-1]), num_item_vectors=num_item_vectors, num_scores=num_scores
    )
    return PackFlops(begin=begin_flops(config, num_tokens=num_tokens), layer=layer, end=end)
