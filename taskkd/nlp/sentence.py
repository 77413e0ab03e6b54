"""Sentence encoders: a transformer, pooling and normalisation as one module, in the folder layout of
sentence-transformers, which is not needed for it."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd.checkpoints import part_of
from taskkd.errors import DataError, RecipeError
from taskkd.losses.primitives import l2_normalise

__all__ = ["Pooling", "SentenceEncoder", "check_sentence_encoders", "is_sentence_encoder", "load_sentence_encoder"]

Pooling = Literal["mean", "cls"]
POOLINGS = ("mean", "cls")
MODULES, WRAPPER, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
logger = logging.getLogger(__name__)


class SentenceEncoder(nn.Module):
    """A transformer whose token states are pooled into one vector a text.

    Args:
        encoder: a transformers model without head, whose output has `last_hidden_state`. Its `pooler`, which is not
            used, is frozen.
        pooling: "mean" over the attention mask, or "cls": the first token's state.
        normalise: divide each embedding by its L2 norm.
        max_length: the number of tokens that texts are cut to, kept for whoever loads the saved folder; None: what the
            tokenizer says.

    Raises:
        RecipeError: no such pooling.
    """

    def __init__(
        self, encoder: nn.Module, *, pooling: Pooling = "mean", normalise: bool = True, max_length: int | None = None
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise RecipeError(f"`pooling` must be 'mean' or 'cls', got {pooling!r}.")
        self.encoder, self.pooling, self.normalise, self.max_length = encoder, pooling, normalise, max_length
        self._takes_types = "token_type_ids" in inspect.signature(encoder.forward).parameters
        unused = getattr(encoder, "pooler", None)
        if isinstance(unused, nn.Module):  # without gradient, DDP would wait for it
            unused.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self.encoder.config

    @property
    def embedding_size(self) -> int:
        """The number of features of an embedding."""
        return int(self.config.hidden_size)

    def around(self, encoder: nn.Module) -> SentenceEncoder:
        """Another encoder with the pooling, normalisation and length of this one."""
        return SentenceEncoder(encoder, pooling=self.pooling, normalise=self.normalise, max_length=self.max_length)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embeddings of a batch, in fp32 (fp64 for an fp64 model).

        Args:
            input_ids: (batch, tokens), or (batch, texts, tokens) where a sample is several texts.
            attention_mask: 1 for tokens, 0 for padding, of the same shape; None: no padding.
            token_type_ids: of the same shape; left out where the transformer takes none.

        Returns:
            `sentence_embedding`, (batch, features) or (batch, texts, features). A text without any token has the
            embedding 0 under mean pooling.
        """
        shape = input_ids.shape[:-1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if token_type_ids is not None and self._takes_types:
            inputs["token_type_ids"] = token_type_ids
        flat = {k: v.reshape(-1, v.shape[-1]) for k, v in inputs.items()}
        states: Tensor = self.encoder(**flat).last_hidden_state
        embedding = _pooled(states, flat["attention_mask"], self.pooling)
        embedding = l2_normalise(embedding) if self.normalise else embedding
        return {"sentence_embedding": embedding.reshape(*shape, -1)}

    def extra_repr(self) -> str:
        """How it pools."""
        return f"pooling={self.pooling!r}, normalise={self.normalise}"

    # ---- folders

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save in the layout of sentence-transformers: `SentenceTransformer(folder)` loads it once a tokenizer is saved
        beside it. `state_dict`: of the whole encoder, where its own parameters are spread over ranks."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder, state_dict=part_of(state_dict, "encoder"))  # type: ignore[operator]
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalise else [])]
        modules = [
            # These names are read by all versions; those since 5.2 write others.
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        modes = {f"pooling_mode_{name}": False for name in ("max_tokens", "mean_sqrt_len_tokens")}
        modes |= {"pooling_mode_cls_token": self.pooling == "cls", "pooling_mode_mean_tokens": self.pooling == "mean"}
        _write(folder / MODULES, modules)
        _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": self.embedding_size, **modes})
        _write(folder / WRAPPER, {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})
        if self.max_length is not None:
            _write(folder / LENGTH, {"max_seq_length": self.max_length, "do_lower_case": False})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, output_loading_info: bool = False
    ) -> Any:
        """Load what `save_pretrained` or sentence-transformers wrote, or a plain transformer (mean, not normalised).

        Args:
            folder: a path or hub name.
            dtype: of the weights.
            output_loading_info: return `(encoder, report)`, as transformers does; the report names keys that are
                missing or too many.

        Raises:
            DataError: there is no such model, or it has modules other than a transformer, mean or [CLS] pooling and
                normalisation.
        """
        from transformers import AutoModel

        from taskkd.nlp.models import pretrained

        inside, options = _layout(str(folder))
        encoder, report = pretrained(AutoModel, str(folder), subfolder=inside, dtype=dtype, output_loading_info=True)
        loaded = cls(encoder, **options)
        return (loaded, report) if output_loading_info else loaded


def load_sentence_encoder(
    source: str, *, sha256: str | None = None, like: SentenceEncoder | None = None
) -> SentenceEncoder:
    """A sentence encoder in fp32.

    Args:
        source: hub name, path, or `package:name/folder`; of sentence-transformers, or a plain transformer.
        sha256: expected digest of a package's weights.
        like: pooling and normalisation of a plain transformer are this one's; None: mean, not normalised.

    Raises:
        DataError: see `SentenceEncoder.from_pretrained`.
    """
    from taskkd.nlp.models import resolve

    folder = resolve(source, sha256)
    loaded: SentenceEncoder = SentenceEncoder.from_pretrained(folder)
    if is_sentence_encoder(folder):
        return loaded
    if like is not None:
        return like.around(loaded.encoder)
    logger.info("%s has no %s: its token states are averaged and not normalised.", source, MODULES)
    return loaded


def check_sentence_encoders(method: str, *pair: nn.Module) -> None:
    """Refuse transformers models, whose outputs have no `sentence_embedding`; modules of one's own pass.

    Raises:
        RecipeError: one of the pair is such a model.
    """
    from transformers import PreTrainedModel

    for model in pair:
        if isinstance(model, PreTrainedModel):
            raise RecipeError(
                f"{method} compares sentence embeddings, which a {type(model).__name__} does not give: use "
                "`data: {type: sentence_embedding}` in a recipe, `taskkd.nlp.SentenceEncoder(model)` in Python."
            )


def _pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(texts, features) of (texts, tokens, features), in fp32 or fp64."""
    states = states if states.dtype == torch.float64 else states.float()
    if pooling == "cls":
        return states[:, 0]
    weight = mask.to(states.dtype)[..., None]
    mean: Tensor = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
    return mean


def is_sentence_encoder(source: str) -> bool:
    """Whether a folder or hub name says how its token states are pooled."""
    return _read(source, MODULES) is not None


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _read(source: str, name: str) -> Any:
    """A JSON file of a folder or hub name; None: it has none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"model {source!r}: {name} cannot be read: {first}") from error


def _layout(source: str) -> tuple[str, dict[str, Any]]:
    """The transformer's sub-folder, and pooling, normalisation and length, from `modules.json`.

    Raises:
        DataError: the modules are not those of a `SentenceEncoder`.
    """
    modules = _read(source, MODULES)
    if modules is None:
        return "", {"pooling": "mean", "normalise": False}
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise DataError(
            f"model {source!r} has the modules {', '.join(kinds) or 'none'}; expected Transformer, Pooling and perhaps "
            "Normalize. Others (as Dense) are not supported: give such a teacher as a module of your own to "
            "`kd.Trainer`, with an output `sentence_embedding`."
        )
    wrapper = _read(source, WRAPPER) or {}
    if wrapper.get("default_prompt_name"):
        raise DataError(
            f"model {source!r} puts the prompt {wrapper['default_prompt_name']!r} before every text; write it into the "
            "texts, and remove default_prompt_name from a copy of the model."
        )
    inside = str(modules[0].get("path", ""))
    length = _read(source, f"{inside}/{LENGTH}" if inside else LENGTH) or {}
    pooling = _pooling(source, _read(source, f"{modules[1]['path']}/config.json") or {})
    return inside, {
        "pooling": pooling,
        "normalise": kinds[-1] == "Normalize",
        "max_length": length.get("max_seq_length"),
    }


def _pooling(source: str, config: dict[str, Any]) -> str:
    """The one mode of a pooling config, in the present or the former form (a flag for each mode)."""
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [k.removeprefix("pooling_mode_") for k, on in config.items() if k.startswith("pooling_mode_") and on]
        modes = [{"mean_tokens": "mean", "cls_token": "cls"}.get(flag, flag) for flag in flags]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise DataError(
            f"model {source!r} pools by {', '.join(map(repr, modes)) or 'nothing'}; expected 'mean' or 'cls'."
        )
    return str(modes[0])
