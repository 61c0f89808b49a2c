"""vLLM weight loader that extends the vocabulary of an unmodified checkpoint by rows for prefixes.

vLLM loads this plugin in each of its processes through the entry-point group `vllm.general_plugins`. The loader reads the base
model's shards without a copy on disk, and appends rows of zeros to tensors whose first dimension is the vocabulary.
"""

from collections.abc import Generator

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from trimtab.engine.vllm_ext.args import LOAD_FORMAT
from trimtab.engine.vllm_ext.patches import patch_kernel_registration


class EnlargedVocabularyLoader(DefaultModelLoader):
    """vLLM's default loader with additional rows in the embedding table and in an untied output head.

    Args:
        load_config: vLLM's configuration. `model_loader_extra_config` holds `vocabulary`, the size in the checkpoint.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        options = dict(load_config.model_loader_extra_config or {})
        self.old_vocabulary = int(options.pop("vocabulary"))
        load_config.load_format = "safetensors"
        load_config.model_loader_extra_config = options
        super().__init__(load_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        added = model_config.get_vocab_size() - self.old_vocabulary
        for name, tensor in super().get_all_weights(model_config, model):
            yield name, enlarge_tensor(tensor, self.old_vocabulary, added)


def enlarge_tensor(tensor: Tensor, vocabulary: int, added: int) -> Tensor:
    """Append rows of zeros to a tensor whose first dimension is the vocabulary.

    Args:
        tensor: tensor of the checkpoint.
        vocabulary: size of the vocabulary in the checkpoint.
        added: number of rows to append.

    Returns:
        [vocabulary + added, ...], or any other tensor unchanged.
    """
    if tensor.ndim == 0 or tensor.shape[0] != vocabulary or added == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])


def register_loader() -> None:
    """Register `load_format="trimtab"` with vLLM, in each of its processes. Entry point of the plugin."""
    patch_kernel_registration()
    register_model_loader(LOAD_FORMAT)(EnlargedVocabularyLoader)
