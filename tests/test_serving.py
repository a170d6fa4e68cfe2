"""Does every scheduler answer every request, with the tokens it would get alone?"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from impl.batching import packed
from impl.batching.schedulers import pad_left
from impl.core import TECHNIQUES, Engine, NotEngaged, Request, StudyError, build, stack
from impl.fidelity import NEAR_TIE
from impl.models.decoder import KVCache
from kernels.build import lacks_compiler

LEAN = ["lean_decoder", "static_batching", "continuous_batching"]
SCHEDULERS = [*LEAN, "eager", "peer_padded_generate", "peer_generate_batch"]
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def small_model(**options):
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE | options)
        return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return small_model()


@contextlib.contextmanager
def serving(model, *names, batch=3, static_cache=False):
    """An engine of this stack on the small model."""
    spec = SimpleNamespace(name="small", kind="decoder", needs=frozenset(
        {"generate", "lean", "linear", "attention"}))  # fmt: skip
    engine = Engine(spec, model, torch.float32, torch.device("cpu"), batch)
    engine = build(engine, stack(*names))
    if static_cache:
        config = engine.model.config
        engine.new_cache = lambda rows, length: KVCache(config, rows, length)
    with engine.undo:
        yield engine


def requests_of(*lengths, arrivals=(), vocab=97):
    """A request per (prompt, new tokens), all there from the start unless said otherwise."""
    source = torch.Generator().manual_seed(len(lengths))
    arrivals = arrivals or [0.0] * len(lengths)
    return [
        Request(i, torch.randint(vocab, (prompt,), generator=source), new, at)
        for i, ((prompt, new), at) in enumerate(zip(lengths, arrivals, strict=True))
    ]


def greedy_choice(model, request, answer):
    """Asserts that every new token of the answer is transformers' own choice, near-ties apart."""
    T, ids = len(request.ids), answer.ids
    assert ids.shape == (T + request.max_new_tokens,), "not as many tokens as asked for"
    assert torch.equal(ids[:T], request.ids), "the prompt was changed"
    with torch.inference_mode():
        logits = model(ids[None]).logits[0, T - 1 : -1].float()  # (new, V)
    chosen = logits.gather(1, ids[T:, None])[:, 0]
    assert (logits.amax(1) - chosen <= NEAR_TIE["fp32"]).all(), f"request {request.id}: wrong token"


def check(model, requests, answers):
    assert [a.id for a in answers] == [r.id for r in requests], "answers lost or out of order"
    for request, answer in zip(requests, answers, strict=True):
        greedy_choice(model, request, answer)
        assert request.arrival_s <= answer.first_token_s <= answer.done_s


TRACES = {
    "more requests than slots": requests_of((5, 7), (9, 2), (1, 12), (17, 1), (3, 9), (30, 4),
                                            (2, 20), (8, 8)),
    "one request": requests_of((6, 5)),
    "equal lengths": requests_of((6, 5), (6, 5), (6, 5), (6, 5)),
    "one token each": requests_of((4, 1), (7, 1), (2, 1), (9, 1)),
    "no token for one": requests_of((4, 3), (7, 0), (2, 5)),
    "as long as the model allows": requests_of((90, 6), (3, 90), (5, 4), (95, 1)),
    "late arrivals": requests_of((5, 9), (4, 3), (8, 6), (3, 3), (6, 2),
                                 arrivals=[0.0, 0.01, 0.01, 0.05, 0.06]),
    "latest listed first": requests_of((5, 3), (4, 6), (8, 4), (3, 5),
                                       arrivals=[0.04, 0.03, 0.0, 0.01]),
}  # fmt: skip


ANSWERABLE = [
    (name, trace)
    for name in SCHEDULERS
    for trace in TRACES  # transformers refuses to generate no token
    if trace != "no token for one" or TECHNIQUES[name].host == "lean"
]


@pytest.mark.parametrize(("name", "trace"), ANSWERABLE)
def test_every_request_gets_the_tokens_it_would_get_alone(model, name, trace):
    with serving(model, name) as engine:
        check(model, TRACES[trace], engine.serve(TRACES[trace]))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", LEAN)
def test_same_tokens_when_shapes_may_not_change(model, name, trace):
    with serving(model, name, static_cache=True) as engine:
        widths = []

        def see(_, args, options):
            if args[0].shape[1] == 1 and not {"last_only", "columns"} & options.keys():
                widths.append((args[0].shape, args[2].slots))

        engine.model.register_forward_pre_hook(see, with_kwargs=True)
        check(model, TRACES[trace], engine.serve(TRACES[trace]))
        if name != "lean_decoder":
            assert len(set(widths)) <= 1, "a decode step changed its shape"


PACKED = ["operator", "gathered", "decode_step"]


@contextlib.contextmanager
def packing(model, how, monkeypatch, **options):
    """Continuous batching by packed steps: attention by our operator or without, or one C++ call.

    Yields the engine and a list: for each step how many prompts it holds, and its single tokens.
    """
    if how != "gathered" and (reason := lacks_compiler()):
        pytest.skip(reason)
    names = ["continuous_batching"] + ["decode_step"] * (how == "decode_step")
    gathers = how != "operator"
    if gathers:
        monkeypatch.setattr(packed, "own_span_operator", lambda keys: None)
    steps, taken = [], []
    with serving(model, *names, **options) as engine:
        point, single = packed.SharedSlots.point, packed.SharedSlots._single_tokens

        def see_point(self, at, positions, prompts, longest):
            steps.append((len(prompts), len(at) - sum(prompts)))
            return point(self, at, positions, prompts, longest)

        def see_single(self, layer, q):
            taken.append(self.paged is None)
            return single(self, layer, q)

        monkeypatch.setattr(packed.SharedSlots, "point", see_point)
        monkeypatch.setattr(packed.SharedSlots, "_single_tokens", see_single)
        yield engine, steps
        fused = engine.stats.get("fused_steps", 0)
        assert fused == (len(steps) if how == "decode_step" else 0), "steps were not one call each"
        assert set(taken) == (set() if how == "decode_step" else {gathers})


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("window", [None, 5])
def test_prompts_and_single_tokens_of_one_step_get_their_own_answers(how, window, monkeypatch):
    model = small_model() if window is None else windowed_model(window)
    trace = TRACES["more requests than slots"]
    with packing(model, how, monkeypatch) as (engine, steps):
        check(model, trace, engine.serve(trace))
    assert any(prompts > 1 for prompts, _ in steps), "no forward held several prompts"
    assert any(prompts and singles for prompts, singles in steps), "no prompt joined a step"
    assert any(singles == 3 for _, singles in steps), "no step served all rows"


@pytest.mark.parametrize("trace", TRACES)
def test_same_tokens_where_a_step_is_one_call(model, trace):
    if reason := lacks_compiler():
        pytest.skip(reason)
    with serving(model, "continuous_batching", "decode_step") as engine:
        check(model, TRACES[trace], engine.serve(TRACES[trace]))


def windowed_model(window):
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.MistralConfig(**SHAPE, sliding_window=window)
        return transformers.MistralForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("static_cache", [False, True])
@pytest.mark.parametrize("name", ["static_batching", "continuous_batching"])
def test_same_tokens_under_a_sliding_window(name, static_cache):
    windowed = windowed_model(5)
    with serving(windowed, name, static_cache=static_cache) as engine:
        trace = TRACES["more requests than slots"]
        check(windowed, trace, engine.serve(trace))


@pytest.mark.parametrize(
    ("need", "capacity", "place"),
    [(4, 40, 0), (5, 40, 14), (6, 40, 14), (7, 40, 30), (10, 40, 30), (11, 40, None),
     (1, 30, 0), (7, 30, None)],
)  # fmt: skip
def test_the_lowest_gap_that_is_wide_enough(need, capacity, place):
    spans = [(20, 10), (4, 10)]  # in no order: gaps 0..3, 14..19 and from 30 on
    seats = [packed.Seat(Request(0, torch.zeros(n - 1), 1), at, n) for at, n in spans]
    assert packed.first_fit(seats, need, capacity) == place
    assert packed.first_fit([], need, capacity) == 0


def test_a_request_that_finds_no_gap_waits_for_one(model):
    # two of 64 slots: 52, 16 and then 64, which fits neither into 52 nor behind 68
    requests = requests_of((50, 2), (4, 12), (50, 14), (3, 2))
    with serving(model, "continuous_batching", batch=2) as engine:
        answers = engine.serve(requests)
    check(model, requests, answers)
    _, long, wide, last = answers
    assert wide.first_token_s > long.done_s, "it was admitted where it has no room"
    assert last.first_token_s >= wide.first_token_s, "a later request overtook it"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_requests_no_answers(model, name):
    with serving(model, name) as engine:
        assert engine.serve([]) == []


@pytest.mark.parametrize("name", ["static_batching", "continuous_batching",
                                  "peer_padded_generate", "peer_generate_batch"])  # fmt: skip
def test_a_request_that_does_not_fit_is_refused_with_both_numbers(model, name):
    with serving(model, name) as engine:
        with pytest.raises(StudyError, match=r"request 1 needs 97 positions .* model has 96"):
            engine.serve(requests_of((5, 3), (90, 7)))
        with pytest.raises(StudyError, match="prompt of request 0 is empty"):
            engine.serve(requests_of((0, 3)))


def test_padding_stands_left_at_the_spare_position():
    ids, positions = pad_left(requests_of((1, 1), (3, 1)), rows=3, spare=7)
    assert positions.tolist() == [[7, 7, 0], [0, 1, 2], [7, 7, 7]]
    assert ids[0, :2].tolist() == [0, 0]


def test_what_a_scheduler_wastes_is_counted(model):
    requests = requests_of((4, 5), (4, 5), (4, 5), (2, 1))
    with serving(model, "static_batching", batch=2) as engine:
        engine.serve(requests)
        # batches (4+4, 4+2): 8 + 8 + 8 + 8 computed, 8 + 8 + 8 + 2 useful
        assert engine.stats["padding_waste"] == pytest.approx(1 - 26 / 32)
        assert engine.stats["mean_batch"] == pytest.approx(12 / 8)
    with serving(model, "continuous_batching", batch=2) as engine:
        engine.serve(requests)
        assert engine.stats["padding_waste"] == 0
        assert engine.stats["slot_occupancy"] == pytest.approx(engine.stats["mean_batch"] / 2)
        assert 0 < engine.stats["scheduler_share"] < 1


@pytest.mark.parametrize(
    ("claimed", "real"),
    [
        ("static_batching", "lean_decoder"),
        ("continuous_batching", "lean_decoder"),
        ("continuous_batching", "static_batching"),
    ],
)
def test_a_scheduler_that_is_off_is_noticed(model, claimed, real):
    trace = TRACES["one request"]  # a proof does not depend on who happened to overlap
    effect = TECHNIQUES[claimed].effect
    with serving(model, claimed) as engine:
        assert effect(engine, lambda: engine.serve(trace))
    with serving(model, real) as engine, pytest.raises(NotEngaged):
        effect(engine, lambda: engine.serve(trace))


@pytest.mark.parametrize("name", ["peer_padded_generate", "peer_generate_batch"])
def test_a_peer_that_is_off_is_noticed(model, name):
    trace = TRACES["more requests than slots"]
    effect = TECHNIQUES[name].effect
    with serving(model, name) as engine:
        assert effect(engine, lambda: engine.serve(trace))
    with serving(model, "eager") as engine, pytest.raises(NotEngaged):
        effect(engine, lambda: engine.serve(trace))
