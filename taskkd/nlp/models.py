"""Teachers and students of the BERT family."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from taskkd.errors import DataError, RecipeError
from taskkd.files import UNREADABLE, file_sha256
from taskkd.nlp.heads import CAUSAL_LM, MASKED_LM, SENTENCE, SEQUENCE, TOKENS, Head, head_of, head_of_checkpoint
from taskkd.packages import PACKAGE, locate
from taskkd.taps import accepted_arguments

__all__ = [
    "check_same_labels",
    "encoder_layers",
    "forward",
    "has_tokenizer",
    "is_regression",
    "label_names",
    "load_config",
    "load_model",
    "load_tokenizer",
    "number_of_labels",
    "pretrained",
    "resolve",
    "same_order",
    "student_from_config",
    "student_from_layers",
]


def resolve(source: str, sha256: str | None = None) -> str:
    """Where a model is: a hub name or path as it is; `package:name/folder` as the folder inside an installed package.

    The package is located, never imported. With `sha256` its `model.safetensors` must have this digest.

    Raises:
        DataError: the package is not installed, the folder is not there, or the digest is another.
    """
    if not source.startswith(PACKAGE):
        return source
    folder = locate(source)
    if not folder.is_dir():
        name, _, inside = source.removeprefix(PACKAGE).partition("/")
        raise DataError(f"model {source!r}: the package {name!r} has no folder {inside!r}.")
    if sha256 is not None and file_sha256(folder / "model.safetensors") != sha256:
        raise DataError(
            f"model {source!r}: model.safetensors has not the expected sha256 {sha256[:16]}…; it was changed."
        )
    return str(folder)


def _from_pretrained(auto: Any, source: str, **options: Any) -> Any:
    try:
        # False, not None: with None the library asks on the terminal whether to run the repository's code.
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except UNREADABLE as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"model {source!r} cannot be loaded: {first}") from error


def pretrained(auto: Any, source: str, *, seed: int = 0, **options: Any) -> Any:
    """`auto.from_pretrained`, without code of the model's folder, without reports and bars; what is missing is
    initialised from `seed`, the global random state left as it was.

    Raises:
        DataError: it cannot be loaded.
    """
    with torch.random.fork_rng([]), _quiet():
        torch.manual_seed(seed)
        return _from_pretrained(auto, source, **options)


def load_tokenizer(source: str, options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a hub name, a path or a package's folder; `options` are its own.

    Raises:
        DataError: there is none.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, resolve(source), **(options or {}))


def has_tokenizer(source: str) -> bool:
    """Whether a model comes with a tokenizer; a hub name is taken to."""
    folder = Path(resolve(source))
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
    return not folder.is_dir() or any((folder / name).is_file() for name in names)


def load_config(source: str) -> Any:
    """The config of a hub name, a path or a package's folder.

    Raises:
        DataError: there is none.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, resolve(source))


def load_model(
    source: str,
    labels: Sequence[str] | None = None,
    *,
    head: Head | None = None,
    sha256: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """A model with a head, in fp32; a missing head is initialised from `seed`.

    Args:
        source: hub name, path, or `package:name/folder`.
        labels: class names in order; none, `[]`, for what has no classes (a sequence classifier without is a
            regressor); None: as the checkpoint says.
        head: default: the one that the checkpoint has, that of a folder of sentence-transformers, or sequence
            classification.
        sha256: expected digest of a package's weights.
        seed: of the head's initialisation; the global random state is left as it was.

    Raises:
        DataError: it cannot be loaded, or its head has another number of labels.
    """
    import transformers

    from taskkd.nlp.sentence import is_sentence_encoder, load_sentence_encoder

    folder = resolve(source, sha256)
    if head is SENTENCE or (head is None and labels is None and is_sentence_encoder(folder)):
        return load_sentence_encoder(folder)
    found = _from_pretrained(transformers.AutoConfig, folder)
    saved = head_of_checkpoint(found)
    head = head or saved or SEQUENCE
    options = {} if labels is None else _label_options(head, labels)
    if head is saved and options.get("num_labels", found.num_labels) != found.num_labels:
        wanted = f"has {len(labels)}: {', '.join(labels)}" if labels else "is regression (one number)"
        raise DataError(f"model {source!r} is a classifier of {found.num_labels} labels, the data {wanted}.")
    if saved is not None and saved is not head:  # a classifier of something else is no start for this one
        options["ignore_mismatched_sizes"] = True
    auto = getattr(transformers, f"AutoModel{head.suffix}")
    model: nn.Module = pretrained(auto, folder, seed=seed, dtype=torch.float32, **options)
    return model


def same_order(source: str, names: Sequence[str], *, trained: bool, head: Head = SEQUENCE) -> list[str]:
    """The class names in the order of a classifier's own head, where it is one of these classes.

    Args:
        source: as for `load_model`.
        names: the classes of the data; none: there is no order.
        head: of the classifier.
        trained: whether the head is used as it is (not fine-tuned first), so that it must be of these classes.

    Raises:
        RecipeError: the head is trained for other classes.
    """
    from transformers import AutoConfig

    if not names:
        return []
    config = _from_pretrained(AutoConfig, resolve(source))
    known = [str(config.id2label[i]) for i in sorted(config.id2label or {})]
    if trained and head is TOKENS and head_of_checkpoint(config) is head and set(names) < set(known):
        return known  # a small training file need not have every tag
    if head_of_checkpoint(config) is not head or len(known) != len(names):
        return list(names)  # a fresh head, or a number of labels that `load_model` refuses
    if sorted(known) == sorted(names):
        return known
    numbered = [f"LABEL_{i}" for i in range(len(known))]
    if trained and known != numbered:
        raise RecipeError(
            f"the teacher {source!r} is trained for the classes {', '.join(known)}, the data has {', '.join(names)}: "
            "rename them in the data, or fine-tune the teacher (`teacher: {finetune: {}}`)."
        )
    return list(names)


class _quiet:  # noqa: N801  (a context manager)
    """Leave out the library's report on newly initialised heads: it is what is asked for."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.before = logging.get_verbosity()
        self.bar = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.before)
        if self.bar:
            logging.enable_progress_bar()


def _label_options(head: Head, labels: Sequence[str]) -> dict[str, Any]:
    """Settings of the config that say which labels there are."""
    if not head.labelled:
        return {}
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    options = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    return {**options, "problem_type": "single_label_classification"} if head is SEQUENCE else options


def is_regression(model: Any) -> bool:
    """Whether the head predicts one number for a text."""
    one = model.config.problem_type == "regression" or model.config.num_labels == 1
    return bool(one and head_of(model) is SEQUENCE)


def number_of_labels(model: Any) -> int:
    """The size of the logits, where there is one for each label."""
    return int(model.config.num_labels)


def label_names(model: Any) -> list[str]:
    """The names of the labels, in the order of the logits; none where there are none."""
    if not head_of(model).labelled or is_regression(model):
        return []
    return [str(model.config.id2label[i]) for i in range(number_of_labels(model))]


def forward(model: Any, batch: Mapping[str, Any]) -> Any:
    """The output of a model for what it takes of a batch, without gradient."""
    with torch.no_grad():
        return model(**accepted_arguments(model.forward)(batch))


def check_same_labels(student: Any, teacher: Any) -> None:
    """Refuse a pair whose logits mean different things.

    Raises:
        RecipeError: heads, vocabularies, or numbers or names of labels differ, or a text may have several labels.
    """
    heads = head_of(student), head_of(teacher)
    for who, model in (("student", student), ("teacher", teacher)):
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            raise RecipeError(
                f"the {who} is for several labels a text (problem_type 'multi_label_classification'); here a text has "
                "one."
            )
    if heads[0] is not heads[1]:
        raise RecipeError(
            f"the student is for {heads[0].title}, the teacher for {heads[1].title}; their logits cannot be compared."
        )
    if heads[0] in (MASKED_LM, CAUSAL_LM):
        sizes = student.config.vocab_size, teacher.config.vocab_size
        if sizes[0] != sizes[1]:
            raise RecipeError(f"the student has a vocabulary of {sizes[0]}, the teacher of {sizes[1]}.")
    if not heads[0].labelled:
        return
    own, other = number_of_labels(student), number_of_labels(teacher)
    if own != other:
        raise RecipeError(
            f"the student has {own} labels, the teacher {other}; logits can only be compared label by label."
        )
    names = (dict(student.config.id2label or {}), dict(teacher.config.id2label or {}))
    if names[0] != names[1] and sorted(names[0].values()) == sorted(names[1].values()):
        raise RecipeError(f"student and teacher order the same labels differently: {names[0]} and {names[1]}.")


def encoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's transformer layers.

    Raises:
        RecipeError: there is no list of as many modules as the config has layers (ALBERT shares one layer).
    """
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and path:
            return path, module
    raise RecipeError(f"{type(model).__name__} has no list of {count} layers to choose from.")


def student_from_layers(
    teacher: nn.Module, layers: Sequence[int], *, architecture: Literal["distilbert"] | None = None, seed: int = 0
) -> nn.Module:
    """A student with these layers of a model (0-based), its embeddings, pooler and head: weights are copied.

    Where a family's first layer is built differently, the student's is, too: it has T5's position bias, which all
    layers use, from the teacher's first; ModernBERT's has no norm before its attention, as the embeddings end in one.

    Source: the initialisation of DistilBERT (Sanh et al. 2019) and Patient KD (Sun et al. 2019).

    Args:
        teacher: the model whose layers are taken.
        layers: in the student's order.
        architecture: None: the teacher's own; "distilbert": see `distilbert_from_bert`.
        seed: of what starts at random, with an architecture.

    Raises:
        RecipeError: a layer is not there or cannot stand where it is asked for, the model has no list of layers, or the
            architecture does not fit.
    """
    from taskkd.nlp.architectures import distilbert_from_bert
    from taskkd.nlp.sentence import SentenceEncoder

    if isinstance(teacher, SentenceEncoder):
        return teacher.around(student_from_layers(teacher.encoder, layers, architecture=architecture, seed=seed))
    if architecture is not None:
        if architecture != "distilbert":
            raise RecipeError(f"no architecture {architecture!r} to build from layers; known: distilbert.")
        return distilbert_from_bert(teacher, layers, seed=seed)
    path, own = encoder_layers(teacher)
    if not layers or not all(0 <= i < len(own) for i in layers):
        raise RecipeError(f"student.layers {list(layers)}: expected numbers from 0 to {len(own) - 1}.")
    config = copy.deepcopy(teacher.config)
    # Settings with one entry for each layer (ModernBERT's layer_types) follow the choice.
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(own):
            setattr(config, name, [value[i] for i in layers])
    config.num_hidden_layers = len(layers)  # type: ignore[union-attr]
    with torch.random.fork_rng([]):
        student: nn.Module = type(teacher)(config)
    given, state = teacher.state_dict(), {}
    for key in student.state_dict():
        if not key.startswith(path + "."):
            state[key] = given[key]
            continue
        place, rest = key.removeprefix(path + ".").split(".", 1)
        sources = (f"{path}.{layers[int(place)]}.{rest}", f"{path}.{place}.{rest}")
        source = next((name for name in sources if name in given), None)
        if source is None:
            raise RecipeError(
                f"student.layers {list(layers)}: layer {layers[int(place)]} of {type(teacher).__name__} has no {rest}, "
                f"which layer {place} of the student needs; leave it where it is in the teacher."
            )
        state[key] = given[source]
    student.load_state_dict(state)
    return student


def student_from_config(teacher: nn.Module, changes: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """A student of the teacher's architecture with other sizes, initialised at random from `seed`.

    Raises:
        RecipeError: the config has no such setting, or the sizes do not go together.
    """
    from taskkd.errors import nearest
    from taskkd.nlp.sentence import SentenceEncoder

    if isinstance(teacher, SentenceEncoder):
        return teacher.around(student_from_config(teacher.encoder, changes, seed=seed))

    config = copy.deepcopy(teacher.config)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise RecipeError(f"student.config: {type(config).__name__} has no {name!r}{nearest(name, vars(config))}.")
        try:
            setattr(config, name, value)
        except Exception as error:  # the library's own kind of validation error
            raise RecipeError(f"student.config: {name}: {str(error).splitlines()[-1].strip()}") from None
    config = _for_its_layers(config, set(changes))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return type(teacher)(config)
        except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise RecipeError(f"student.config: {error}") from None


def _for_its_layers(config: Any, given: set[str]) -> Any:
    """The config with its lists of one entry a layer (ModernBERT's `layer_types`) as its class makes them."""
    settings = config.to_dict()
    stale = {
        name
        for name, value in settings.items()
        if "layer" in name and isinstance(value, list) and len(value) != config.num_hidden_layers and name not in given
    }
    if not stale:
        return config
    fresh = type(config).from_dict({name: value for name, value in settings.items() if name not in stale})
    fresh._attn_implementation = config._attn_implementation
    return fresh
