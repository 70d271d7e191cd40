# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which of ``dynamo.vllm``'s workers can be refitted, decided by their arguments."""

from __future__ import annotations

from dynamo.vllm.args import Config
from dynamo.vllm.constants import DisaggregationMode

from dynamo.refit.rank.supported import (
    check_settings,
    refuse_setting,
    settings_of_arguments,
)

NO_AGENT = "no refit agent runs beside it, so it would serve its first weights for ever"
OLD_EMBEDDINGS = (
    "media that were seen before would keep the embeddings of older weights"
)


def check_arguments(config: Config) -> None:
    """Refuse what a refit would get wrong, before anything is downloaded or loaded.

    Raises:
        UnsupportedConfiguration: names the flag, and the way out.
    """
    encode = config.disaggregation_mode == DisaggregationMode.ENCODE
    cache = config.multimodal_embedding_cache_capacity_gb > 0
    for used, flag, why in (
        (config.realtime, "--realtime", NO_AGENT),
        (config.embedding_worker, "--embedding-worker", NO_AGENT),
        (config.classify_worker, "--classify-worker", NO_AGENT),
        (encode, "--disaggregation-mode encode", NO_AGENT),
        (config.route_to_encoder, "--route-to-encoder", "encode workers have no agent"),
        (cache, "--multimodal-embedding-cache-capacity-gb", OLD_EMBEDDINGS),
        (config.custom_encoder_class, "--custom-encoder-class", OLD_EMBEDDINGS),
    ):
        if used:
            refuse_setting(flag, why)
    check_settings(settings_of_arguments(config.engine_args))
