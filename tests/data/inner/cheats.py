"""Every way to a wrong number that we know of: each of these must fail and leave no entry."""

import functools

import torch

from impl.core import NotEngaged, Request, Response
from tests.emulated import Device

DEVICE = Device()
KERNEL = 1.5e-3  # s
IDS = [torch.randint(100, (2, 8), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def product(x):
    return x @ x


def extend(ids, new=4):
    return torch.cat([ids, ids[:, :new]], dim=1)


def same_start(output, ids):
    n = min(output.shape[1], 12)
    torch.testing.assert_close(output[:, :n], extend(ids)[:, :n])


# ---- honest: these must pass -------------------------------------------------------------


def test_honest_launches_in_wall_time(measure):
    measure(DEVICE.kernel(KERNEL, product), DEVICE.kernel(2 * KERNEL, product), device=DEVICE)


def test_honest_launches_in_event_time(measure):
    variant, baseline = DEVICE.kernel(KERNEL, product), DEVICE.kernel(2 * KERNEL, product)
    measure(variant, baseline, device=DEVICE, timing="event")


def test_honest_generation(measure):
    measure(extend, extend, IDS, same_start, tokens_per_call=8)


def test_honest_a_a(measure):
    measure(measure.product, measure.product)


# ---- cheats ------------------------------------------------------------------------------


def test_work_on_another_stream(measure):
    variant = DEVICE.kernel(KERNEL, product, DEVICE.other)
    measure(variant, DEVICE.kernel(KERNEL, product), device=DEVICE, timing="event")


def test_cached_output(measure):
    measure(functools.cache(product))


def test_zeros(measure):
    measure(torch.zeros_like)


def test_constants(measure):
    right = product(measure.inputs[0])
    measure(lambda x: right)


def test_unwritten_buffer(measure):
    buffer = product(measure.inputs[0])  # the right answer of an earlier call
    measure(lambda x: buffer, outputs=[buffer])


def test_unwritten_memory(measure):
    shape = (512, 512)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    calls = []

    def half_done(x):
        calls.append(x)
        return product(x) if len(calls) == 1 else torch.empty(shape)

    measure(half_done, inputs=inputs)


def test_fewer_tokens(measure):
    measure(lambda ids: extend(ids, 3), extend, IDS, same_start, tokens_per_call=8)


def test_tokens_moved_between_requests(measure):
    def serve(requests, answers=(3, 5)):
        return [
            Response(r.id, torch.cat([r.ids, r.ids[:n]]), 0.0, 0.1)
            for r, n in zip(requests, answers, strict=True)
        ]

    traces = [[Request(i, row, 4) for i, row in enumerate(ids)] for ids in IDS]
    whole = functools.partial(serve, answers=(4, 4))
    measure(serve, whole, traces, lambda output, given: None, tokens_per_call=8)


def test_fewer_tokens_on_the_other_side(measure):
    measure(extend, lambda ids: extend(ids, 3), IDS, same_start, tokens_per_call=8)


def quality(metric, delta, budget):
    return {"metric": metric, "value": delta, "baseline": 0.0, "delta": delta, "stderr": None,
            "budget": budget, "data": None}  # fmt: skip


def test_kl_over_budget(measure):
    measure(product, quality=[quality("kl", 0.9, 0.01)])


def test_top1_agreement_over_budget(measure):
    measure(product, quality=[quality("top1_agreement", -0.3, -0.02)])


def test_claimed_but_off(measure):
    def effect():
        raise NotEngaged("no weight is stored as int8")

    measure(product, effect=effect)


def test_impossible_speed(measure):
    measure(product, bytes_moved=1e12)


def test_failed_after_it_was_filed(measure):
    measure(product)
    raise AssertionError("too late")


def test_nan_in_the_record(measure):
    measure(product, extra={"surprise": 1.0})
