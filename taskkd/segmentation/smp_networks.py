"""Networks of segmentation-models-pytorch, on its own encoders or on timm's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.backbones import IMAGENET, TIMM, check_fit, downloaded, quiet, timm_normal, timm_options, timm_with
from taskkd.errors import RecipeError, nearest
from taskkd.segmentation.config import SegmenterConfig
from taskkd.segmentation.torchvision_networks import Normal, Weights

__all__ = ["assemble"]

CLASSES = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "fpn": "FPN",
    "pan": "PAN",
    "pspnet": "PSPNet",
    "deeplabv3plus": "DeepLabV3Plus",
    "segformer": "Segformer",
    "upernet": "UPerNet",
}
WIDTHS = {"pspnet": "psp_out_channels", "segformer": "decoder_segmentation_channels"}  # the others: decoder_channels
LEVELS = ("unet", "unetplusplus", "manet")


def assemble(config: SegmenterConfig, classes: int, weights: Weights) -> tuple[nn.Module, Normal, int]:
    """A network of its own class, the statistics of its images, and what their sides must be multiples of.

    Args:
        config: with one of its architectures.
        classes: the channels of its logits.
        weights: of the encoder: tensors, "imagenet", or None.

    Raises:
        RecipeError: it is not installed; encoder and architecture do not go together; the weights are of another.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise RecipeError(
            f"architecture {config.architecture!r} needs segmentation-models-pytorch: pip install 'taskkd[smp]'"
        ) from None
    name, source = config.body, config.weights or ""
    options = _options(config) | {"classes": classes, "encoder_weights": None}
    if name.startswith(TIMM):
        timm_with(name.removeprefix(TIMM))
        options |= timm_options(name.removeprefix(TIMM), weights, source)
        options["encoder_weights"] = options.pop("pretrained", None)
    elif name not in (known := smp.encoders.get_encoder_names()):
        raise RecipeError(
            f"no encoder {name!r} in segmentation-models-pytorch{nearest(name, known)}; timm's are 'timm:<name>'."
        )
    elif weights == "imagenet":
        options["encoder_weights"] = "imagenet"
    net = _made(smp, config, options)
    if isinstance(weights, Mapping) and not name.startswith(TIMM):
        _load_encoder(net.encoder, weights, source)
    if config.depth is not None or config.architecture == "pspnet":
        _drop_unused(net)
    divisor = int(net.encoder.output_stride) if net.requires_divisible_input_shape else 1
    return net, _normal(smp, net, name, weights, source), divisor


def _options(config: SegmenterConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    depth = config.depth or 5
    if config.depth is not None:
        found["encoder_depth"] = depth
    if config.output_stride is not None:
        found["encoder_output_stride"] = config.output_stride
    width = config.width or 16
    if config.architecture in LEVELS:
        found["decoder_channels"] = [width * 2**level for level in reversed(range(depth))]
    elif config.width is not None and config.architecture == "fpn":
        found |= {"decoder_segmentation_channels": width, "decoder_pyramid_channels": 2 * width}
    elif config.width is not None:
        found[WIDTHS.get(config.architecture or "", "decoder_channels")] = width
    return found


def _made(smp: Any, config: SegmenterConfig, options: Mapping[str, Any]) -> Any:
    kind, encoder = getattr(smp, CLASSES[config.architecture or ""]), config.body.replace(TIMM, "tu-")
    with quiet("timm"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return downloaded(lambda: kind(encoder, **options), f"ImageNet weights of {config.body}")
        except (
            ValueError,
            KeyError,
            RuntimeError,
            NotImplementedError,
            TypeError,
            AttributeError,
            IndexError,
        ) as error:
            # its own checks of what goes with what
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RecipeError(f"{config.architecture} cannot be built on {config.body!r}: {first}") from None


def _load_encoder(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = encoder.state_dict()
    check_fit(own, state, source)
    encoder.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def _drop_unused(net: nn.Module, side: int = 128) -> None:
    """Take out what no output depends on: of an encoder that is cut short, the library keeps the rest.

    It would cost time and memory, and data-parallel training waits for gradients of every parameter.
    """
    net.eval()
    names, parameters = zip(*net.named_parameters(), strict=True)
    with torch.random.fork_rng([]), torch.enable_grad():
        gradients = torch.autograd.grad(net(torch.rand(1, 3, side, side)).sum(), parameters, allow_unused=True)
    net.train()
    used = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]
    unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    while unused:
        path = unused[0].rpartition(".")[0]
        while not any(name.startswith(f"{path.rpartition('.')[0]}.") for name in used):
            path = path.rpartition(".")[0]
        net.set_submodule(path, nn.Identity())
        unused = [name for name in unused if not name.startswith(f"{path}.")]


def _normal(smp: Any, net: Any, name: str, weights: Weights, source: str) -> Normal:
    if name.startswith(TIMM):
        return timm_normal(net.encoder.model, weights, source)
    if weights != "imagenet":
        return IMAGENET
    found = downloaded(lambda: smp.encoders.get_preprocessing_params(name, "imagenet"), f"settings of {name}")
    return found["mean"], found["std"]
