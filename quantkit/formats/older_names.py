"""config.json for readers that know transformers before its version 5.

Version 5 collects what it says about rotary positions in one dictionary, ``rope_parameters``.
Readers of the older names (mlx-lm, AutoAWQ, transformers 4 and what is built on it) do not look
there: they take their own defaults, and compute something else without a word. Both ways are
written, and transformers 5 reads them as the same.

    rope_parameters                                     before
    rope_theta                                          rope_theta
    partial_rotary_factor                               partial_rotary_factor
    rope_type and its numbers, where not "default"      rope_scaling
    of sliding_attention: rope_theta                    rope_local_base_freq   (Gemma 3)
    GPT-NeoX: rope_theta, partial_rotary_factor         rotary_emb_base, rotary_pct
"""

from collections.abc import Mapping
from typing import Any

_NEW = "rope_parameters"
_NEOX_SHARE = 0.25  # transformers' default of rotary_pct


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with what its ``rope_parameters`` say under the older names too. What it already
    says under them stays."""
    said = config.get(_NEW)
    if not isinstance(said, Mapping):
        return dict(config)
    if isinstance(said.get("full_attention"), Mapping):
        older = _older(said["full_attention"])
        sliding = said.get("sliding_attention")
        if isinstance(sliding, Mapping) and "rope_theta" in sliding:
            older["rope_local_base_freq"] = sliding["rope_theta"]
    else:
        older = _older(said)
    if config.get("model_type") == "gpt_neox":
        share = older.pop("partial_rotary_factor", _NEOX_SHARE)
        older["rotary_pct"] = share
        if "rope_theta" in older:
            older["rotary_emb_base"] = older.pop("rope_theta")
    return {**older, **config}


def _older(said: Mapping[str, Any]) -> dict[str, Any]:
    own = ("rope_theta", "partial_rotary_factor")
    older = {key: said[key] for key in own if said.get(key) is not None}
    if said.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in said.items() if key not in own}
    return older
