"""Recorded passes: they follow whatever can change a module's answer without changing the module, or are given up."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integrations.tiny_language_models import adapted, language_model, layers, like, prompt
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from workbench.integrations.transformers import generate
from workbench.speculation import causal as causal_module
from workbench.speculation import tracing
from workbench.speculation.causal import Layers, Stack, causal
from workbench.speculation.tracing import fingerprint, recording

FULL = ("full_attention",)


def written(model: Any, draft: Any) -> list[int]:
    made = generate(model, draft, prompt(6), draft_length=2, max_new_tokens=16, do_sample=False)
    return made.sequences[0].tolist()


def set_adapter(*names: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for part in layers(model):
            part.active = list(names)

    return change


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    model(prompt(6), labels=prompt(6)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def without(model: Any) -> None:
    pass


def load(model: Any) -> None:
    model.load_state_dict(language_model(seed=5).state_dict())


def copied(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(8 * model.model.layers[0].mlp.up_proj.weight)


def other_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).contiguous()


def other_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def replaced(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj = nn.Linear(16, 24, bias=True)


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, out: -out)


def put_on(model: Any) -> None:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda states: forward(states).flip(-1)


def scaled(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = -30.0


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()


def fewer_layers(model: Any) -> None:
    model.model.config.num_hidden_layers = 1  # a plain pass goes through so many of its layers


def swapped(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


# What changes, in a model that was prepared so. Each of these changes what is written.
CHANGES: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "another adapter": (adapted, set_adapter("b")), "two adapters": (adapted, set_adapter("a", "b")),
    "no adapter": (adapted, set_adapter()), "adapters put in": (without, adapted), "trained": (without, trained),
    "loaded": (without, load), "written in place": (without, copied), "other data": (without, other_data),
    "another parameter": (without, other_parameter), "a part replaced": (without, replaced),
    "a hook": (without, hooked),
    "a hook taken away": (hooked, lambda model: model.model.layers[0]._forward_hooks.clear()),
    "a forward put on": (without, put_on), "an attribute": (without, scaled),
    "an activation": (without, other_activation), "configuration": (without, fewer_layers),
    "parts swapped": (without, swapped),
}  # fmt: skip


def changed(name: str, patch: pytest.MonkeyPatch) -> tuple[list[int], list[int], list[int]]:
    """What a model writes, what it writes after the change, and what it should write then."""
    prepare, change = CHANGES[name]
    model, draft = language_model(), language_model(seed=1)
    prepare(model)
    before = written(model, draft)
    change(model)
    after = written(model, draft)
    with patch.context() as plain:
        plain.setattr(causal_module, "recording", lambda module, kinds: None)
        return before, after, written(model, draft)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_follows_every_change_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, right = changed(name, monkeypatch)
    assert after == right != before


@pytest.mark.parametrize("name", ["another adapter", "a part replaced", "an attribute", "a hook", "parts swapped"])
def test_the_changes_are_missed_by_recordings_that_are_kept_by_object_or_by_weights(
        name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, Any] = {}

    def by_object(module: Any, kinds: Any) -> Any:
        if id(module) not in kept:
            with monkeypatch.context() as any_part:
                any_part.setattr(tracing, "KNOWN", ("",))
                kept[id(module)] = recording(module, kinds)
        return kept[id(module)]

    monkeypatch.setattr(causal_module, "recording", by_object)
    before, after, right = changed(name, monkeypatch)
    assert after == before != right


def test_a_recording_is_kept_while_nothing_changes_and_made_anew_where_something_does() -> None:
    model = language_model()
    first = recording(model, FULL)
    assert first is not None and recording(model, FULL) is first
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert recording(model, FULL) is first  # it reads the weights where they are
    written(model, language_model(seed=1))
    assert recording(model, FULL) is first
    changes: tuple[Callable[[Any], object], ...] = (
        lambda m: m.to(torch.bfloat16), scaled, other_activation, other_data, lambda m: m.train(), lambda m: m.eval(),
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.5), lambda m: m.set_attn_implementation("eager"),
        lambda m: setattr(m.config, "sliding_window", 3))
    for change in changes:
        change(model)
        second = recording(model, FULL)
        assert second is not None and second is not first
        first = second
    kept = weakref.ref(model)
    del model, first, second
    gc.collect()
    assert kept() is None


def test_functions_that_a_model_calls_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = language_model(), language_model(seed=1)
    before = written(model, draft)
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q, k, sin, cos))
    after = written(model, draft)
    monkeypatch.setattr(causal_module, "recording", lambda module, kinds: None)
    assert after == written(model, draft) != before


def test_there_is_no_recording_where_it_could_not_be_relied_upon() -> None:
    model = language_model()
    assert fingerprint(model) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recording(model, FULL) is None
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    assert recording(model, FULL) is None
    handle.remove()
    model.model.norm.note = object()
    assert recording(model, FULL) is None
    del model.model.norm.note
    assert recording(model, FULL) is not None
    adapted(model)
    assert recording(model, FULL) is None and isinstance(causal(model, "target").begin(1)._memory, Layers)


def deciding(how: Callable[[Tensor], bool]) -> Any:
    """A model that takes one of two ways by the values, or by the sizes, of what it is given."""
    model = language_model()
    norm = type(model.model.norm)

    class Deciding(norm):  # type: ignore[misc, valid-type]
        def forward(self, states: Tensor) -> Tensor:
            return norm.forward(self, states) * (1 if how(states) else 2)

    Deciding.__module__ = norm.__module__
    model.model.norm.__class__ = Deciding
    assert fingerprint(model) is not None
    return model


@pytest.mark.parametrize("how", [
    lambda states: states.sum() > 0, lambda states: states.sum().item() > 0,
    lambda states: states.tolist()[0][0][0] > 0, lambda states: bool(torch.allclose(states, -states)),
    lambda states: states.detach().numpy().sum() > 0, lambda states: states.shape[1] > 1,
    lambda states: states.shape[0] == 2, lambda states: states.shape[1] % 2 == 0])
def test_a_model_that_decides_by_values_or_sizes_is_not_recorded(how: Callable[[Tensor], bool]) -> None:
    assert recording(deciding(how), FULL) is None


def test_a_model_that_asks_without_deciding_is_recorded() -> None:
    assert recording(deciding(lambda states: states.dim() == 3 and states.dtype is torch.float32), FULL) is not None


def test_numbers_are_told_apart_by_sizes_that_are_not_alike() -> None:
    alike = tracing._Writer(((2, 3, 5, 2), (4, 7, 11, 4)), [[torch.zeros(())]] * 2)
    assert alike._size([2, 4]) == "(1 * B + 0)"  # of the tokens wanted, misread
    apart = tracing._Writer(tracing.RECORDED_AT, [[torch.zeros(())]] * 4)
    rows, n, past, wanted = zip(*tracing.RECORDED_AT, strict=True)
    assert [apart._size(values) for values in (rows, n, past, wanted)] == [
        "(1 * B + 0)", "(1 * n + 0)", "(1 * past + 0)", "(1 * wanted + 0)"]
    assert apart._size([4 * a * b + 1 for a, b in zip(rows, n, strict=True)]) == "(4 * B * n + 1)"
    assert apart._size([a + b for a, b in zip(n, past, strict=True)]) == "(1 * end + 0)"


def test_recording_warns_of_nothing_and_needs_no_deprecated_part_of_torch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = language_model()
        assert isinstance(causal(model, "target").begin(1)._memory, Stack)
        written(model, like(model, 0.1))


def test_weights_of_a_class_of_their_own_are_not_recorded() -> None:
    class Quantised(nn.Parameter):
        pass

    model = language_model()
    model.lm_head.weight = Quantised(model.lm_head.weight.detach())
    model.lm_head.weight.__class__ = Quantised
    assert recording(model, FULL) is None


def test_a_known_function_with_arguments_of_its_own_is_seen_through() -> None:
    model = language_model()
    model.model.layers[0].mlp.act_fn.act = functools.partial(nn.functional.gelu, approximate="tanh")
    first = fingerprint(model)
    assert first == fingerprint(model)
    model.model.layers[0].mlp.act_fn.act.keywords["approximate"] = "none"
    assert first != fingerprint(model)
