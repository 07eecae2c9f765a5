"""Our models in transformers: `import retentive.hf`, then its Auto classes open our folders.

AutoConfig, AutoModelForCausalLM and AutoTokenizer, and with them `pipeline`, Trainer and PEFT. A
folder that either package writes the other opens.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    if error.name == "transformers":
        reason = 'pip install "retentive[hf]"'
    else:
        reason = f"the one that is installed fails to import: {error}"
    raise ImportError(f"retentive.hf takes transformers: {reason}") from error

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retentive.hf.cache import RetentiveCache
from retentive.hf.config import RetentiveConfig, RetentiveTransformerConfig
from retentive.hf.model import (
    RetentiveForCausalLM,
    RetentiveQuantizedForCausalLM,
    RetentiveTransformerForCausalLM,
)
from retentive.hf.tokenizer import RetentiveTokenizer

__all__ = [
    "RetentiveCache",
    "RetentiveConfig",
    "RetentiveForCausalLM",
    "RetentiveTokenizer",
    "RetentiveTransformerConfig",
    "RetentiveTransformerForCausalLM",
]

for _model in (
    RetentiveForCausalLM,
    RetentiveTransformerForCausalLM,
    RetentiveQuantizedForCausalLM,
):
    _config = _model.config_class
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
    # Trainer asks here by whose labels to shift, where it smooths them.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _model.__name__
    AutoTokenizer.register(_config, fast_tokenizer_class=RetentiveTokenizer)
