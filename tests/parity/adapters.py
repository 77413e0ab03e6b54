"""From the arrays of a parity case to taskkd's public API: names and documented factors, no formula.

`ADAPTERS[key](arrays, params) -> {"loss": ..., ...}`; arrays are named `in_*` and `w_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import layer_maps, losses
from taskkd.adapters import ABF, ChannelAssign, Conv1x1, ConvReg, Linear, Variational
from taskkd.attention import ChannelAttention, LayerAttention
from taskkd.contrastive import ContrastiveRelation, ContrastiveRepresentation
from taskkd.losses import targets
from taskkd.losses.channels import reduce_channels
from taskkd.losses.embeddings import candidate_scores
from taskkd.losses.features import overhaul_margin
from taskkd.mixup import mixing_shares
from taskkd.schedules import Progress, warmup
from taskkd.terms import Run
from tests.parity.detection import ADAPTERS as DETECTION
from tests.parity.end_to_end import tinybert_e2e
from tests.parity.face import ADAPTERS as FACE
from tests.parity.segmentation import ADAPTERS as SEGMENTATION

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def kd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student"], arrays["in_teacher"]
    value = losses.kl_divergence(student, teacher, temperature=params["T"], dim=1)
    # DistillKL (its cases record dtype and scale) divides maps by the batch alone: a sum over pixels.
    pixels = student[0, 0].numel() if "scale" in params else 1
    return {"loss": value * pixels}


def dml(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.kl_divergence(student, teacher, temperature=params["T"])}


def schedule(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    weight = warmup(1.0, steps=params["warmup"])
    epochs = arrays["in_epoch"].tolist()  # counted from 1, our steps from 0
    return {"loss": torch.tensor([weight(Progress(epoch - 1)) for epoch in epochs], dtype=torch.float64)}


def levels(arrays: Arrays, side: str) -> list[Tensor]:
    """`in_s0, in_s1, ...` in order."""
    return [arrays[f"in_{side}{i}"] for i in range(sum(name.startswith(f"in_{side}") for name in arrays))]


def attention_transfer(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    distance = "euclidean" if params.get("mode") == "paper" else "squared"
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.attention_transfer(s, t, power=params["p"], distance=distance)}


def own_teacher(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.partial_mse(s, t) * s.numel()}  # they sum


def factor_transfer(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    if "p1" in params:  # RepDistiller's loss of this name compares attention maps
        distance = {1: "absolute", 2: "squared"}[params["p2"]]
        return {"loss": losses.attention_transfer(s, t, power=params["p1"], distance=distance)}
    return {"loss": losses.factor(s, t)}


def flow_of_solution(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    options = {name: params[name] for name in ("pool", "squared") if name in params}
    value = losses.flow_of_solution(students, teachers, **options)
    columns = 1 if params.get("squared", True) else students[-1].shape[1]
    return {"loss": value * (len(students) - 1) * columns}  # they sum over pairs, and over columns if not squared


def loaded(module: nn.Module, arrays: Arrays, names: Mapping[str, str]) -> nn.Module:
    """`module` in float64 with their weights; `names` are their prefixes by ours."""
    state = {}
    for ours, theirs in names.items():
        found = {n.removeprefix(f"w_{theirs}."): v for n, v in arrays.items() if n.startswith(f"w_{theirs}.")}
        state |= {f"{ours}.{name}": value for name, value in found.items()}
    module.double().load_state_dict(state)
    return module


def hint(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    if "w_conv.weight" not in arrays:
        return {"loss": losses.mse(s, t)}
    regressor = loaded(ConvReg(s.shape[1:], t.shape[1:]), arrays, {"map": "conv", "norm": "bn"})
    mapped = regressor(s, t)
    return {"loss": losses.mse(mapped, t), "reg": mapped}


def review(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    fusion = ABF(params["in_channels"], params["out_channels"], mid=params["mid_channel"])
    names, deepest = {}, len(students) - 1  # they count from the deepest
    for level in range(len(students)):
        parts = {"reduce": "conv1", "expand": "conv2"}
        names |= {f"{ours}.{level}": f"abf{deepest - level}.{theirs}" for ours, theirs in parts.items()}
        if level < deepest:
            names[f"attention.{level}"] = f"abf{deepest - level}.att_conv.0"
    mapped = loaded(fusion, arrays, names)(students, teachers)
    return {"loss": losses.pyramid(mapped, teachers) * len(students)}  # they sum over levels


def overhaul(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    if "in_bn_weight" in arrays:
        return {"loss": overhaul_margin(arrays["in_bn_weight"], arrays["in_bn_bias"])}
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.overhaul(s, t, margin=arrays["in_margin"]) * s.numel()}  # they sum


def activation_boundaries(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.activation_boundaries(s, t, margin=params["margin"]) * s.numel()}  # they sum


def neuron_selectivity(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.neuron_selectivity(arrays["in_student"], arrays["in_teacher"])}


def variational_information(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    mid = arrays["w_regressor.0.weight"].shape[0]
    adapter = Variational(s.shape[1], t.shape[1], mid=mid, variance=params["init_pred_var"], eps=params["eps"]).double()
    # `functional_call`, so that the gradients arrive at their weights
    weights = {f"mean.{i}.weight": arrays[f"w_regressor.{i}.weight"] for i in (0, 2, 4)}
    pair = torch.func.functional_call(adapter, {**weights, "scale": arrays["w_log_scale"]}, (s, t))
    return {"loss": losses.variational_information(pair, t, eps=params["eps"])}


def prediction_aware(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    pair = (arrays["in_student"], arrays["in_log_var"])
    return {"loss": losses.prediction_aware(pair, arrays["in_teacher"], eps=params["eps"])}


def pyramid(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    return {"loss": losses.pyramid(students, teachers) * len(students)}  # they sum over levels


def pkd_distillation(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student_logits"], arrays["in_teacher_logits"]
    task = F.cross_entropy(student, arrays["in_labels"])
    # The authors divide by batch * classes (docstring of patient_kd).
    soft = losses.kl_divergence(student, teacher, temperature=params["T"]) / student.shape[1]
    alpha = params["alpha"]
    return {"loss": alpha * soft + (1 - alpha) * task, "loss_kd": soft, "loss_ce": task}


def pkd_patience(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student_patience"], arrays["in_teacher_patience"]
    return {"loss": losses.patience(student, teacher, normalise=params["normalized_patience"])}


def dkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"alpha": params["alpha"], "beta": params["beta"], "temperature": params["T"]}
    student, teacher = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.decoupled(student, teacher, labels=arrays["in_labels"], **options)}


def dist(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"inter": params["beta"], "intra": params["gamma"], "temperature": params["tau"]}
    return {"loss": losses.dist(arrays["in_student"], arrays["in_teacher"], dim=1, **options)}


def pair(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Student and teacher, as the core's cases (`in_student`) or the face ones (`in_s`) name them."""
    short = "in_s" in arrays
    return arrays["in_s" if short else "in_student"], arrays["in_t" if short else "in_teacher"]


def sp(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.similarity_preserving(*pair(arrays))}


def fr_sp(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.similarity_preserving(*pair(arrays), normalise="samples")}


def rkd_distance(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.relational_distance(*pair(arrays))}


def rkd_angle(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.relational_angle(*pair(arrays))}


def rkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    distance = losses.relational_distance(*pair(arrays), squared=params.get("squared", False))
    angle = losses.relational_angle(*pair(arrays))
    weights = [params.get("distance_weight", params.get("w_d")), params.get("angle_weight", params.get("w_a"))]
    return {"loss": weights[0] * distance + weights[1] * angle}


def cc(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    if "P_order" in params:
        options = {"gamma": params["gamma"], "order": params["P_order"]}
        return {"loss": losses.correlation_congruence(*pair(arrays), **options)}
    return {"loss": losses.consecutive_correlation(*pair(arrays))}


def fr_cc(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    # TFace's loop leaves out the last order (docstring of correlation_congruence).
    options = {"gamma": params["gamma"], "order": params["p"] - 1}
    return {"loss": losses.correlation_congruence(*pair(arrays), **options)}


def irg(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = ([arrays[f"in_{who}_{name}"] for name in ("fm1", "fm2", "feat", "out")] for who in "st")
    options = {
        "vertices": params["w_irg_vert"],
        "edges": params["w_irg_edge"],
        "transformations": params["w_irg_tran"],
    }
    return {"loss": losses.instance_relationship(student, teacher, **options)}


def cat_ka(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    # The authors minimise the negative alignment: ours minus 1 (docstring of kernel_alignment).
    return {"loss": losses.kernel_alignment(*pair(arrays), centred=False) - 1}


def pkt(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = pair(arrays)
    # The authors divide by batch * batch (docstring of probabilistic_transfer).
    return {"loss": losses.probabilistic_transfer(student, teacher, eps=params["eps"]) / student.shape[0]}


def cskd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    labels, total = arrays["in_labels"], torch.zeros((), dtype=torch.float64)
    for name, compact in (("feat", 0.0), ("logits", params["w_center"])):
        student, teacher = arrays[f"in_student_{name}"], arrays[f"in_teacher_{name}"]
        # The authors divide by features and by classes once more (docstring of category_structure).
        intra, inter = params["w_intra"] / student[0].numel(), params["w_inter"] / labels.unique().numel()
        options = {"intra": intra, "inter": inter, "compact": compact}
        total = total + losses.category_structure(student, teacher, labels=labels, **options)
    return {"loss": total}


def darkrank(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"alpha": params["alpha"], "beta": params["beta"], "length": params["permute_len"]}
    return {"loss": losses.dark_rank(*pair(arrays), **options)}


def fr_darkrank(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"alpha": params["alpha"], "beta": params["beta"], "length": params["permute_len"]}
    return {"loss": losses.dark_rank(*pair(arrays), normalise=True, **options)}


def fr_cosine(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.cosine(*pair(arrays))}


def fr_fitnet(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.mse(*pair(arrays))}


def fr_kd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.kl_divergence(*pair(arrays), temperature=params["t"])}


def peers(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    if "in_labels" in arrays:  # their plain KD: T instead of T^2, and the hard loss at temperature T too
        soft = losses.kl_divergence(s, t, temperature=params["T"]) / params["T"]
        hard = F.cross_entropy(s / params["T"], arrays["in_labels"])
        return {"loss": params["alpha"] * soft + (1 - params["alpha"]) * hard}
    return {"loss": losses.kl_divergence(s, t, temperature=params["T"], target_floor=1e-7)}


def bake(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    logits, options = arrays["in_logits"], {"temperature": params["T"]}
    ensemble = targets.batch_ensemble(logits, arrays["in_feats"], omega=params["omega"], **options)
    loss = params["lamda"] * losses.kl_divergence(logits, ensemble, **options)
    return {"loss": loss, "targets": torch.softmax(ensemble / params["T"], 1)}


def task_oriented(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    # The authors leave out T^2 (docstring of soft_cross_entropy).
    return {"loss": losses.soft_cross_entropy(s, t, temperature=params["T"]) / params["T"] ** 2}


def singular_vectors(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    value = losses.singular_vectors(students, teachers, count=params["k"])
    # They sum (docstring of singular_vectors).
    return {"loss": value * students[0].shape[1] ** 2 * params["k"] * (len(students) - 1)}


def weighted_features(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_s0"], arrays["in_t0"]
    adapter = Conv1x1(student.shape[1], teacher.shape[1])
    state = {f"map.{name}": arrays[f"w_0.{name}"] for name in ("weight", "bias")}
    mapped = torch.func.functional_call(adapter, state, (student,))
    return {"loss": params["beta"] * losses.channel_weighted(mapped, teacher)}


def matching_guided(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t, flow, margin = arrays["in_student"], arrays["in_teacher"], arrays["in_flow"], arrays["in_margin"]
    value = losses.matching_guided(s, t, assignment=flow, margin=margin) * s.numel()  # they sum
    reduced = ChannelAssign(flow, s.shape[1])(t)
    torch.testing.assert_close(reduced, reduce_channels(t, s.shape[1], flow))
    mean = ChannelAssign(flow, s.shape[1], reduce="mean")(margin)
    return {"loss": value, "teacher_reduced": reduced, "margin_reduced": mean}


def noise_contrast(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    likelihoods = arrays["in_x"][..., 0]
    one = torch.ones_like(likelihoods[:, :1])  # ours takes embeddings: of one dimension, so that they are the scores
    options = {"samples": params["n_data"], "temperature": 1.0}
    return {"loss": losses.noise_contrastive(one, likelihoods.log()[..., None], **options)}


def contrastive_term(term: Any, arrays: Arrays, samples: int) -> Any:
    """The term with the case's weights: embeddings and memories."""
    first = {n.rstrip("0"): v for n, v in arrays.items()}
    run = Run({"id": first["in_idx"]}, None, {"out": first["in_student"]}, {"out": first["in_teacher"]})
    term.build(run)
    for which, side, memory in zip((0, 1), "st", ("w_memory_v1_0", "w_memory_v2_0"), strict=True):
        state = {"map.weight": arrays[f"w_embed_{side}.weight"], "map.bias": arrays[f"w_embed_{side}.bias"]}
        term.embeddings[which].load_state_dict(state)
        term.banks[which].load_state_dict({"rows": arrays[memory].detach()})
    return term


def crd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    steps = sum(name.startswith("in_idx") for name in arrays)
    drawn = iter(arrays[f"in_contrast_idx{i}"][:, 1:] for i in range(steps))
    options = {"temperature": params["nce_t"], "momentum": params["nce_m"], "features": params["feat_dim"]}
    term = ContrastiveRepresentation("crd", "out", samples=params["n_data"], draw=lambda ids: next(drawn), **options)
    term = contrastive_term(term, arrays, params["n_data"])
    values = []
    for i in range(steps):
        student, teacher = {"out": arrays[f"in_student{i}"]}, {"out": arrays[f"in_teacher{i}"]}
        values.append(term(Run({"id": arrays[f"in_idx{i}"]}, None, student, teacher)))
    memories = {"memory_v1": term.banks[0].rows, "memory_v2": term.banks[1].rows}
    return {"loss": torch.stack(values), "Z": term.log_z.exp(), **memories}


def crcd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    memory = arrays["w_memory_v1_0"]
    options = {"temperature": params["T"], "features": memory.shape[1], "negatives": params["K"]}
    draw = lambda ids: arrays["in_contrast_idx"][:, 1:]  # noqa: E731
    term = ContrastiveRelation("crcd", "out", samples=len(memory), draw=draw, **options)
    term = contrastive_term(term, arrays, len(memory))
    run = Run({"id": arrays["in_idx"]}, None, {"out": arrays["in_student"]}, {"out": arrays["in_teacher"]})
    return {"loss": term(run), "memory_v1": term.banks[0].rows, "memory_v2": term.banks[1].rows}


def attention_based_features(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    channels = [[x.shape[1] for x in maps] for maps in (students, teachers)]
    attention = LayerAttention(*channels, features=params["qk_dim"]).double().train(params["bn"] != "eval")
    names = {
        "p_s": "student_positions", "p_t": "teacher_positions", "linear_trans_s.key_layer": "keys",
        "linear_trans_s.bilinear": "bilinear", "linear_trans_t.query_layer": "queries", ".bn.": ".norm.",
    }  # fmt: skip
    state = {}
    for name, value in arrays.items():
        if name.startswith("w_attention."):
            ours = name.removeprefix("w_attention.")
            for theirs, own in names.items():
                ours = ours.replace(theirs, own)
            state[ours] = value
    weights = torch.func.functional_call(attention, state, (students, teachers))
    # They sum over the teacher's layers.
    return {"loss": losses.attention_based_features(students, teachers, attention=weights) * len(teachers)}


def channel_attention(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    attention = ChannelAttention(t.shape[1], reduction=params["att_f"])
    state = {}
    for i in (0, 2):
        state[f"gate.{i}.weight"] = arrays[f"w_attention.{i}.weight"].flatten(1)  # a 1x1 convolution of means
        state[f"gate.{i}.bias"] = arrays[f"w_attention.{i}.bias"]
    weights = torch.func.functional_call(attention, state, (t,))
    return {"loss": losses.channel_weighted(s, t, channels=weights, normalise=True)}


def uncertainty_mixup(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": mixing_shares(params["batch_size"], turning=params["b"], steepness=params["w"])}


def logits(arrays: Arrays) -> tuple[Tensor, Tensor]:
    return arrays["in_student_logits"], arrays["in_teacher_logits"]


def projected(x: Tensor, arrays: Arrays, name: str) -> Tensor:
    """Through a linear map with the weights `w_<name>_weight` and `w_<name>_bias`."""
    weight, bias = arrays[f"w_{name}_weight"], arrays[f"w_{name}_bias"]
    adapter = Linear(weight.shape[1], weight.shape[0])
    return torch.func.functional_call(adapter, {"map.weight": weight, "map.bias": bias}, (x,))


def tinybert_intermediate(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    depth, step = params["student_layers"], params["teacher_layers"] // params["student_layers"]
    scores, states = [], []
    for i, j in layer_maps.uniform(depth, params["teacher_layers"]):
        s, t = arrays[f"in_student_att_{i}"], arrays[f"in_teacher_att_{j}"]
        scores.append(losses.attention_scores(s, t, clip=params["score_clip"]))
    for i in range(depth + 1):
        s, t = projected(arrays[f"in_student_hidden_{i}"], arrays, "fit_dense"), arrays[f"in_teacher_hidden_{i * step}"]
        states.append(losses.mse(s, t))
    att, rep = torch.stack(scores).sum(), torch.stack(states).sum()  # a term for each, all of weight 1
    return {"loss": att + rep, "loss_att": att, "loss_rep": rep}


def tinybert_prediction(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher, temperature = arrays["in_student_logits"], arrays["in_teacher_logits"], params["temperature"]
    value = losses.soft_cross_entropy(student, teacher, temperature=temperature)
    # The authors divide by batch * classes and leave out T^2 (docstring of soft_cross_entropy).
    return {"loss": value / student.shape[1] / temperature**2}


def lrc_bert(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    negatives = arrays["in_negatives"] if params["negatives"] == "given" else None
    return {"loss": losses.cosine_nce(arrays["in_student"], arrays["in_teacher"], negatives=negatives)}


def minilm(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    names, total = {"1": "query", "2": "key", "3": "value"}, torch.zeros((), dtype=torch.float64)
    for pair_of_ids, weight in params["relations"].items():
        name = names[pair_of_ids[1]]
        s, t = (projected(arrays[f"in_{who}_hidden"], arrays, f"{who}_{name}") for who in ("student", "teacher"))
        heads, mask = params["relation_heads"], arrays["in_attention_mask"]
        # The concatenated heads as one: they are split anew.
        relation = losses.self_attention_relation(s[:, None], t[:, None], heads=heads, mask=mask)
        total = total + weight * relation
    return {"loss": total}


def cofi(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students = [projected(x, arrays, "transform") for x in arrays["in_student_hidden"]]
    teachers = [arrays["in_teacher_hidden"][i] for i in params["teacher_layers"]]
    ordered = {3: False, 4: True}[params["version"]]
    layer = losses.dynamic_layers(students, teachers, ordered=ordered) * len(teachers)  # they sum over them
    ce = losses.kl_divergence(*logits(arrays), temperature=params["temperature"])
    total = params["ce_alpha"] * ce + params["layer_alpha"] * layer
    return {"loss": total, "loss_layer": layer, "loss_ce": ce}


def attention_mse(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.attention_scores(*pair(arrays), mask=arrays["in_mask"])}


def attention_mse_sum(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    heads = arrays["in_student"].shape[1]
    # They sum scores over the heads (docstring of attention_scores).
    return {"loss": losses.attention_scores(*pair(arrays), heads="mean", mask=arrays["in_mask"]) * heads**2}


def attention_ce(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.attention_cross_entropy(*pair(arrays), clip=-1e-3)}  # without a mask they clip


def attention_ce_mean(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"heads": "mean", "keys": "all"}  # their softmax takes in the padding
    return {"loss": losses.attention_cross_entropy(*pair(arrays), mask=arrays["in_mask"], **options)}


def distilbert(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = logits(arrays)
    labels, valid = arrays["in_lm_labels"], arrays["in_attention_mask"]
    tokens = labels != -100 if params["restrict_ce_to_mask"] else valid
    ce = losses.kl_divergence(student, teacher, temperature=params["temperature"], dim=-1, mask=tokens)
    cos = losses.cosine(arrays["in_student_hidden"], arrays["in_teacher_hidden"], mask=valid)
    predicted, true = (student, labels) if params["mlm"] else (student[:, :-1], labels[:, 1:])
    task = F.cross_entropy(predicted.flatten(0, 1), true.flatten())
    name = "mlm" if params["mlm"] else "clm"
    total = params["alpha_ce"] * ce + params[f"alpha_{name}"] * task + params["alpha_cos"] * cos
    return {"loss": total, "loss_ce": ce, "loss_cos": cos, f"loss_{name}": task}


def distilbert_squad(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    ends = [(arrays[f"in_{end}_logits_stu"], arrays[f"in_{end}_logits_tea"]) for end in ("start", "end")]
    ce = torch.stack([losses.kl_divergence(*end, temperature=params["temperature"]) for end in ends]).mean()
    return {"loss": params["alpha_ce"] * ce + params["alpha_squad"] * arrays["in_hard_loss"], "loss_ce": ce}


def gkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"beta": params["beta"], "temperature": params["temperature"], "dim": -1}
    value = losses.generalised_jsd(*logits(arrays), mask=arrays["in_labels"] != -100, **options)
    return {"loss": value / params["temperature"] ** 2}  # they leave out T^2 (docstring of generalised_jsd)


def answers(labels: Tensor, skip_last: bool) -> Tensor:
    """Which tokens are labelled; without the last of them, which ends the text."""
    found = labels != -100
    return found & (found.flip(1).cumsum(1).flip(1) > 1) if skip_last else found


def uld(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    mask, others = (answers(arrays[f"in_{who}_labels"], params["skip_eos"]) for who in ("student", "teacher"))
    options = {"temperature": params["temperature"], "teacher_mask": others}
    return {"loss": losses.universal_logits(*logits(arrays), mask=mask, **options)}


def sentence_columns(arrays: Arrays, side: str) -> list[Tensor]:
    return [arrays[f"in_{side}_{i}"] for i in range(sum(name.startswith(f"in_{side}_") for name in arrays))]


def embeddings(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    loss = {"mse": losses.mse, "l2": losses.euclidean, "cosine": losses.cosine}[params["metric"]]
    students, teachers = sentence_columns(arrays, "student"), sentence_columns(arrays, "teacher")
    if params["projection_dim"] is not None:
        students = [projected(x, arrays, "projection") for x in students]
    return {"loss": torch.stack([loss(s, t) for s, t in zip(students, teachers, strict=True)]).mean()}


def margin_mse(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    query, *candidates = (arrays[f"in_student_{i}"] for i in range(params["negatives"] + 2))
    return {"loss": losses.margin_mse(candidate_scores(query, candidates), arrays["in_teacher_margin"])}


def ranking(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    query, *candidates = sentence_columns(arrays, "student")
    scores = candidate_scores(query, candidates), arrays["in_teacher_scores"]
    return {"loss": losses.kl_divergence(*scores, temperature=params["temperature"])}


def masked_cosine(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.cosine(*pair(arrays), mask=arrays["in_mask"])}


def hidden_mse(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.mse(*pair(arrays), mask=arrays["in_mask"])}


def token_flow(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = sentence_columns(arrays, "student"), sentence_columns(arrays, "teacher")
    return {"loss": losses.flow_of_solution(students, teachers)}


def token_similarity(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = sentence_columns(arrays, "student"), sentence_columns(arrays, "teacher")
    return {"loss": losses.token_similarity(students, teachers)}


def textbrewer_kd_ce(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    # They leave out T^2, which with one temperature for each sample is a weight of each (docstring of kl_divergence).
    temperature = arrays["in_temperature"]
    weight = (temperature**-2).expand(len(arrays["in_student_logits"]))
    value = losses.soft_cross_entropy(*logits(arrays), temperature=temperature, mask=weight)
    return {"loss": value * weight.mean()}


def textbrewer_kd_mse(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.logit_mse(*logits(arrays)) / params["temperature"] ** 2}  # docstring of logit_mse


def textbrewer_pkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = (x[:, :1] for x in pair(arrays))  # [CLS] as the one layer
    return {"loss": losses.patience(student, teacher) * student.shape[2]}  # they sum over features


def probability_shift(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": targets.probability_shift(arrays["in_teacher_logits"], arrays["in_labels"])}


def flsw(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"base": params["base"], "spread": params["beta"], "power": params["gamma"]}
    value = targets.dynamic_temperature(*logits(arrays), by="cosine", normalise=False, eps=1e-4, **options)
    return {"loss": value}


def cwsm(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"base": params["base"], "spread": params["beta"]}
    value = targets.dynamic_temperature(*logits(arrays), by="confidence", normalise=False, eps=1e-3, **options)
    return {"loss": value}


def textbrewer_match(match: Mapping[str, Any], arrays: Arrays, number: int) -> tuple[str, Tensor]:
    """Its name there and its value; `number` is that of its projection."""
    mask, several = arrays["in_mask"], isinstance(match["layer_S"], list)
    kind = {"attention": "att", "hidden": "hidden"}[match["feature"]]
    layers = [match[f"layer_{side}"] if several else [match[f"layer_{side}"]] for side in "ST"]
    s, t = (
        [arrays[f"in_{who}_{kind}_{i}"] for i in of] for who, of in zip(("student", "teacher"), layers, strict=True)
    )
    if "proj" in match:
        s = [projected(x, arrays, f"proj{number}") for x in s]
    value = {
        "hidden_mse": lambda: losses.mse(s[0], t[0], mask=mask),
        "mmd": lambda: losses.token_similarity(s, t, mask=mask),
        "attention_mse": lambda: losses.attention_scores(s[0], t[0], mask=mask),
    }[match["loss"]]()
    name = "_".join("-".join(map(str, of)) for of in layers)
    return f"loss_unweighted_{match['feature']}_{match['loss']}_{name}", value


def textbrewer(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    temperature, hard = params["temperature"], arrays["in_hard_loss"]
    soft = losses.soft_cross_entropy(*logits(arrays), temperature=temperature, dim=-1, mask=arrays["in_mask"])
    soft = soft / temperature**2  # they leave it out
    total = params["kd_loss_weight"] * soft + params["hard_label_weight"] * hard
    found = {"loss_unweighted_kd_loss": soft, "loss_unweighted_hard_label_loss": hard}
    for number, match in enumerate(params["matches"]):
        name, value = textbrewer_match(match, arrays, number)
        found[name], total = value, total + match["weight"] * value
    return {"loss": total, **found}


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "core/ab": activation_boundaries,
    "core/afd": attention_based_features,
    "core/afds": channel_attention,
    "core/at": attention_transfer,
    "core/bake": bake,
    "core/byot": own_teacher,
    "core/cat_ka": cat_ka,
    "core/cc": cc,
    "core/crcd": crcd,
    "core/crd": crd,
    "core/cskd": cskd,
    "core/darkrank": darkrank,
    "core/dist": dist,
    "core/dkd": dkd,
    "core/dml": dml,
    "core/fitnet": hint,
    "core/fsp": flow_of_solution,
    "core/ft": factor_transfer,
    "core/irg": irg,
    "core/kd": kd,
    "core/kdsvd": singular_vectors,
    "core/l2tww": weighted_features,
    "core/mgd_match": matching_guided,
    "core/nce": noise_contrast,
    "core/nst": neuron_selectivity,
    "core/ofd": overhaul,
    "core/okddip": peers,
    "core/one": peers,
    "core/pad": prediction_aware,
    "core/pkt": pkt,
    "core/reviewkd": review,
    "core/reviewkd_hcl": pyramid,
    "core/rkd": rkd,
    "core/rkd_a": rkd_angle,
    "core/rkd_d": rkd_distance,
    "core/schedule": schedule,
    "core/sp": sp,
    "core/tofd": task_oriented,
    "core/unixkd": uncertainty_mixup,
    "core/vid": variational_information,
    "face/fr_cc": fr_cc,
    "face/fr_cosine": fr_cosine,
    "face/fr_darkrank": fr_darkrank,
    "face/fr_fitnet": fr_fitnet,
    "face/fr_kd_t4": fr_kd,
    "face/fr_rkd": rkd,
    "face/fr_sp": fr_sp,
    "face/pkt": pkt,
    "nlp/cofi_layer": cofi,
    "nlp/distilbert": distilbert,
    "nlp/distilbert_squad": distilbert_squad,
    "nlp/gkd_jsd": gkd,
    "nlp/lrc_cos_nce": lrc_bert,
    "nlp/minilmv2": minilm,
    "nlp/pkd_distillation": pkd_distillation,
    "nlp/pkd_patience": pkd_patience,
    "nlp/st_distill_kldiv": ranking,
    "nlp/st_embed_distill": embeddings,
    "nlp/st_margin_mse": margin_mse,
    "nlp/tinybert_e2e": tinybert_e2e,
    "nlp/textbrewer_attention_ce": attention_ce,
    "nlp/textbrewer_attention_ce_mean": attention_ce_mean,
    "nlp/textbrewer_attention_mse": attention_mse,
    "nlp/textbrewer_attention_mse_sum": attention_mse_sum,
    "nlp/textbrewer_cos": masked_cosine,
    "nlp/textbrewer_fsp": token_flow,
    "nlp/textbrewer_general": textbrewer,
    "nlp/textbrewer_hidden_mse": hidden_mse,
    "nlp/textbrewer_kd_ce": textbrewer_kd_ce,
    "nlp/textbrewer_kd_mse": textbrewer_kd_mse,
    "nlp/textbrewer_mmd": token_similarity,
    "nlp/textbrewer_pkd": textbrewer_pkd,
    "nlp/textbrewer_probability_shift": probability_shift,
    "nlp/textbrewer_temperature_cwsm": cwsm,
    "nlp/textbrewer_temperature_flsw": flsw,
    "nlp/tinybert_intermediate": tinybert_intermediate,
    "nlp/tinybert_prediction": tinybert_prediction,
    "nlp/uld": uld,
    **DETECTION,
    **SEGMENTATION,
    **FACE,
}
