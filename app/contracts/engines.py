"""Names of engines and of formats of weights. This module imports nothing, so that it is quick."""

from typing import Literal

EngineName = Literal["transformers", "vllm"]
EngineOption = Literal["auto", "transformers", "vllm"]
LoadedWeights = Literal["plain", "bfloat16", "int8"]
WeightsName = Literal["auto", "plain", "bfloat16", "int8"]
