"""Room for rows: a vLLM weight loader that reads an untouched checkpoint into a model with a larger vocabulary.

vLLM loads this in each of its processes through the entry-point group `vllm.general_plugins`. Nothing is copied on
disk: the engine reads the base model's own shards, and tensors as long as the vocabulary gain rows of zeros on the way.
"""

from collections.abc import Generator

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from trimtab.engine.vllm_ext.args import LOAD_FORMAT


class EnlargedVocabularyLoader(DefaultModelLoader):
    """vLLM's default loader, with rows added to the embedding table and to an untied head."""

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
    """`added` rows of zeros after a tensor whose first dimension is the vocabulary; any other tensor as it is."""
    if tensor.ndim == 0 or tensor.shape[0] != vocabulary or added == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])


def register_loader() -> None:
    """Entry point: makes `load_format="trimtab"` known to vLLM."""
    register_model_loader(LOAD_FORMAT)(EnlargedVocabularyLoader)
