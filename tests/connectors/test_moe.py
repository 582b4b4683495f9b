"""The mixture of experts against the published formulas, each written out here for one token at a
time."""

import copy
import itertools
import math

import pytest
import torch

from medm.connectors.moe import MoEConnector
from medm.errors import RecipeError
from medm.types import VisionFeatures
from tests.connectors.tiny import features_on

TASKS = ["vqa", "refer", "identify", "caption", "cls"]
GATES, ROUTES = ["soft", "sparse", "hard", "constant"], ["token", "task", "task+token"]


def moe(grid=(4, 4), **options):
    torch.manual_seed(0)
    connector = MoEConnector(in_dim=16, out_dim=24, grid=grid, **{"tasks": TASKS, **options})
    # Larger than the initial weights, so that the gates differ from one another.
    for name, parameter in connector.named_parameters():
        if name.startswith("router"):
            torch.nn.init.normal_(parameter, std=0.5)
    return connector


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def affine(module, x):
    return module.weight @ x + module.bias


def published(connector, tokens, task_ids, gate, route, top_k=2):
    """Every expert on every token, with the weights of the paper."""
    outputs = []
    for image, task in zip(tokens, task_ids.tolist(), strict=True):
        for token in image:
            if gate == "constant":
                weights = torch.full((5,), 1 / 5)
            elif gate == "hard":
                weights = torch.tensor([1.0 if i == task else 0.0 for i in range(5)])
            else:
                task_token = connector.router.task_tokens[task] if route != "token" else None
                seen = {"token": [token], "task": [task_token], "task+token": [task_token, token]}[
                    route
                ]
                hidden = gelu(affine(connector.router.layers[0], torch.cat(seen)))
                logits = affine(connector.router.layers[2], hidden)
                if gate == "soft":
                    weights = torch.sigmoid(logits) / torch.sigmoid(logits).sum()
                else:
                    kept = set(logits.argsort(descending=True)[:top_k].tolist())
                    masked = torch.stack(
                        [z if i in kept else z - torch.inf for i, z in enumerate(logits)]
                    )
                    weights = (
                        torch.exp(masked - masked.max()) / torch.exp(masked - masked.max()).sum()
                    )
            parts = []
            for expert in connector.experts:
                y = affine(expert[0], token)
                parts.append(affine(expert[2], gelu(y)) if len(expert) > 1 else y)
            outputs.append(sum(w * part for w, part in zip(weights, parts, strict=True)))
    return torch.stack(outputs).view(len(tokens), -1, 24)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("gate", "route"), list(itertools.product(GATES, ROUTES)))
def test_published_mode_equals_the_formulas(gate, route, depth):
    connector = moe(gate=gate, route_by=route, mode="paper", depth=depth).double()
    features, task_ids = features_on((4, 4), batch=3), torch.tensor([4, 0, 2])
    tokens = features.tokens.double()
    got = connector(VisionFeatures(tokens, (4, 4)), task_ids)
    # The gate itself is float32 whatever the weights are.
    torch.testing.assert_close(
        got, published(connector, tokens, task_ids, gate, route), atol=1e-6, rtol=1e-6
    )


def test_published_sizes_of_the_router():
    with torch.device("meta"):
        connector = MoEConnector(
            in_dim=1408,
            out_dim=4096,
            grid=(16, 16),
            prefix=1,
            num_experts=5,
            gate="soft",
            route_by="task+token",
            mode="paper",
            resample="projection",
            window=[1, 4],
            tasks=TASKS,
        )

    def millions(module):
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    assert connector.num_tokens == 64
    assert connector.experts[0][0].in_features == 5632
    assert millions(connector.router.layers) == pytest.approx(507.78, abs=0.01)
    assert millions(connector.experts) == pytest.approx(199.27, abs=0.01)
    assert connector.router.task_tokens.shape == (5, 5632)
    with torch.device("meta"):
        for route, task_dim, expected in (
            ("token", None, 127.01),
            ("task", 768, 2.38),
            ("task+token", 768, 163.99),
        ):
            other = MoEConnector(
                in_dim=5632,
                out_dim=4096,
                grid=(8, 8),
                route_by=route,
                mode="paper",
                task_dim=task_dim,
                tasks=TASKS,
            )
            assert millions(other.router.layers) == pytest.approx(expected, abs=0.01)


def test_the_corrected_router_is_narrow():
    connector = moe(route_by="task+token")
    assert connector.router.layers[0].weight.shape == (256, 64 + 16)


def test_hand_computed_gates():
    # Logits (4, 0, 0, 0, 0): normalised sigmoids stay flat, a softmax does not.
    for mode, expected in (("paper", [0.3293, 0.1677]), ("corrected", [0.9317, 0.0171])):
        connector = moe(mode=mode)
        with torch.no_grad():
            connector.router.layers[2].weight.zero_()
            connector.router.layers[2].bias.copy_(torch.tensor([4.0, 0, 0, 0, 0]))
        weights, _ = connector.router(features_on((4, 4)).tokens, None)
        assert weights[0, 0, :2].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("gate", "route"), list(itertools.product(["sparse", "hard"], ROUTES)))
def test_sparse_equals_dense_with_zeros_in_value_and_gradient(gate, route):
    skipping, dense = moe(gate=gate, route_by=route), None
    dense = copy.deepcopy(skipping)
    dense._skips = False
    features, task_ids = features_on((4, 4), batch=3), torch.tensor([4, 0, 2])
    outputs = []
    for connector in (skipping, dense):
        output = connector(features, task_ids)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)
    for (name, one), (_, other) in zip(
        skipping.named_parameters(), dense.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("gate", "rows"), [("sparse", 2), ("hard", 1)])
def test_experts_that_were_not_chosen_do_no_work(gate, rows):
    connector = moe(gate=gate)
    seen = [0] * 5
    for i, expert in enumerate(connector.experts):
        expert.register_forward_hook(
            lambda _m, args, _o, i=i: seen.__setitem__(i, seen[i] + len(args[0]))
        )
    connector(features_on((4, 4), batch=3), torch.tensor([1, 1, 3]))
    assert sum(seen) == 3 * 16 * rows
    if gate == "hard":
        assert seen == [0, 32, 0, 16, 0]


def test_an_expert_without_tokens_is_still_called_and_has_a_gradient_of_zero():
    connector = moe(gate="hard")
    called = []
    for i, expert in enumerate(connector.experts):
        expert.register_forward_hook(lambda *_args, i=i: called.append(i))
    connector(features_on((4, 4)), torch.tensor([1, 1])).sum().backward()
    assert called == [0, 1, 2, 3, 4]
    grads = [expert[0].weight.grad for expert in connector.experts]
    assert all(grad is not None for grad in grads)
    assert [bool(grad.any()) for grad in grads] == [False, True, False, False, False]


def test_the_task_changes_the_output_where_it_routes_and_only_there():
    features = features_on((4, 4))
    for gate, route in itertools.product(GATES, ROUTES):
        connector = moe(gate=gate, route_by=route)
        one, other = (connector(features, torch.tensor(ids)) for ids in ([0, 0], [3, 3]))
        assert connector.needs_task is (
            gate == "hard" or (gate in ("soft", "sparse") and route != "token")
        )
        assert torch.equal(one, other) is not connector.needs_task


@pytest.mark.parametrize("task_ids", [torch.tensor([0, 5]), torch.tensor([9, 0]), None])
def test_an_unseen_task_is_an_error_unless_the_recipe_says_otherwise(task_ids):
    for gate in ("soft", "hard"):
        with pytest.raises(
            ValueError, match=r"of 2 items have a task that the router does not know"
        ):
            moe(gate=gate, route_by="task")(features_on((4, 4)), task_ids)


@pytest.mark.parametrize("route", ["task", "task+token"])
def test_an_unseen_task_as_the_mean_of_the_known_ones(route):
    connector, features = moe(route_by=route, unseen_task="mean"), features_on((4, 4))
    weights, _ = connector.router(features.tokens, torch.tensor([1, 5]))
    with torch.no_grad():
        connector.router.task_tokens[2] = connector.router.task_tokens.mean(dim=0).clone()
        connector.router.task_tokens[1] = 0
    mean_token = connector.router(features.tokens, torch.tensor([2, 2]))[0][1]
    torch.testing.assert_close(weights[1], mean_token)
    hard = moe(gate="hard", unseen_task="mean", num_experts=6)
    weights, _ = hard.router(features.tokens, torch.tensor([1, 9]))
    assert weights[0, 0].tolist() == [0, 1, 0, 0, 0, 0]
    torch.testing.assert_close(weights[1, 0], torch.tensor([0.2] * 5 + [0.0]))


@pytest.mark.parametrize("gate", ["soft", "sparse", "hard"])
def test_an_unseen_task_as_the_mean_of_all_experts(gate):
    connector, features = (
        moe(gate=gate, route_by="task", unseen_task="constant"),
        features_on((4, 4)),
    )
    expected = sum(expert(features.tokens) for expert in connector.experts) / 5
    got = connector(features, torch.tensor([1, 7]))
    torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(got[0], expected[0], atol=1e-3)
    torch.testing.assert_close(connector(features, None), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [-100.0, -60000.0, 60000.0, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("gate", "mode", "route"),
    [
        *itertools.product(["soft", "sparse"], ["paper", "corrected"], ["token"]),
        *itertools.product(["soft"], ["paper", "corrected"], ["task+token"]),
    ],
)
def test_extreme_gates_stay_numbers(gate, mode, route, bias, dtype):
    connector = (
        moe(gate=gate, mode=mode, route_by=route, router_dim=8, task_dim=4).to(dtype).train()
    )
    with torch.no_grad():
        # All logits at the same extreme: the published quotient would be 0 / 0; then a single one.
        connector.router.layers[2].bias.fill_(bias)
    features = features_on((4, 4))
    tokens = features.tokens.to(dtype).requires_grad_()
    for _ in range(2):
        output = connector(VisionFeatures(tokens, (4, 4)), torch.arange(len(tokens)))
        losses = connector.auxiliary_losses().values()
        (output.float().square().mean() + sum(losses)).backward()
        assert output.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in connector.parameters())
        assert tokens.grad.isfinite().all()
        with torch.no_grad():
            connector.router.layers[2].bias[1:] = 0


def test_a_router_that_picks_one_expert_learns_from_the_answers():
    # As published it cannot: the softmax over a single kept logit is 1.
    for mode, learns in (("corrected", True), ("paper", False)):
        connector = moe(gate="sparse", top_k=1, mode=mode)
        output = connector(features_on((4, 4)))
        chosen = connector.router(features_on((4, 4)).tokens, None)[0]
        assert chosen.sum(dim=-1).eq(1).all()
        assert set(chosen.flatten().tolist()) == {0.0, 1.0}
        output.square().mean().backward()
        assert bool(connector.router.layers[2].weight.grad.any()) is learns


def test_load_balance_is_one_when_even_and_grows_when_not():
    for gate in ("soft", "sparse"):
        connector, features = moe(gate=gate, top_k=1).train(), features_on((4, 4))
        with torch.no_grad():
            for parameter in connector.router.parameters():
                parameter.zero_()
        connector(features)
        even = connector.auxiliary_losses()["load_balance"]
        assert even.item() == pytest.approx(1.0, abs=1e-6)
        with torch.no_grad():
            connector.router.layers[2].bias[3] = 20.0
        connector(features)
        collapsed = connector.auxiliary_losses()["load_balance"]
        assert collapsed.item() == pytest.approx(5.0, abs=1e-3)
        collapsed.backward()
        assert connector.router.layers[2].bias.grad[3] >= 0


def test_load_balance_by_hand():
    # Two tokens, two experts, top 1: softmax (0.8, 0.2) and (0.6, 0.4): both choose the first.
    connector = MoEConnector(
        in_dim=2, out_dim=2, grid=(1, 2), num_experts=2, gate="sparse", top_k=1
    ).train()
    connector.router.layers = torch.nn.Sequential(torch.nn.Identity())
    logits = torch.tensor([[[0.8, 0.2], [0.6, 0.4]]]).log()
    _, loss = connector.router(logits, None)
    assert loss.item() == pytest.approx(2 * (1.0 * 0.7 + 0.0 * 0.3), abs=1e-6)


def test_auxiliary_losses_belong_to_corrected_training_alone():
    features = features_on((4, 4))
    for options, train, expected in (
        ({"mode": "paper"}, True, set()),
        ({"mode": "corrected"}, False, set()),
        ({"mode": "corrected", "gate": "hard"}, True, set()),
        ({"mode": "corrected", "gate": "constant"}, True, set()),
        ({"mode": "corrected", "gate": "sparse"}, True, {"load_balance"}),
    ):
        connector = moe(**options).train(train)
        connector(features, torch.tensor([0, 1]))
        assert set(connector.auxiliary_losses()) == expected
        assert connector.auxiliary_losses() == {}


def test_routing_weights_are_exact_detached_and_do_not_grow():
    connector = moe(gate="hard", unseen_task="constant")
    features = features_on((4, 4), batch=3)
    for _ in range(4):
        connector(features, torch.tensor([1, 1, 9]))
    assert connector.routing_weights() == {
        "refer": [0, 1, 0, 0, 0],
        "(unseen)": pytest.approx([0.2] * 5),
    }
    assert connector._weight_sums.shape == (6, 6)
    assert not connector._weight_sums.requires_grad
    assert connector._weight_sums[1].tolist() == [0, 128, 0, 0, 0, 128]
    assert "_weight_sums" not in connector.state_dict()
    connector.reset_routing_weights()
    assert connector.routing_weights() == {}


def test_a_dummy_is_routed_and_counted_nowhere():
    for gate in GATES:
        connector = moe(gate=gate, route_by="task")
        output = connector(features_on((4, 4)), torch.tensor([-1, -1]))
        assert output.isfinite().all()
        assert connector.routing_weights() == {}
        connector(features_on((4, 4)), torch.tensor([2, -1]))
        assert list(connector.routing_weights()) == ["identify"]


def test_weight_sums_of_a_soft_gate_are_the_mean_weights_of_the_task():
    connector, features = moe(route_by="task"), features_on((4, 4), batch=2)
    weights, _ = connector.router(features.tokens, torch.tensor([0, 4]))
    connector(features, torch.tensor([0, 4]))
    shares = connector.routing_weights()
    assert shares["vqa"] == pytest.approx(weights[0, 0].tolist(), abs=1e-6)
    assert shares["cls"] == pytest.approx(weights[1, 0].tolist(), abs=1e-6)


def test_resampling_before_the_experts_works_on_volumes():
    connector = MoEConnector(
        in_dim=16, out_dim=24, grid=(2, 4, 4), prefix=1, resample="projection", window=2
    )
    assert connector.num_tokens == 4
    assert connector.experts[0][0].in_features == 128
    assert connector(features_on((2, 4, 4), prefix=1)).shape == (2, 4, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "hard", "tasks": []}, "there is no list of tasks"),
        ({"route_by": "task", "tasks": []}, "there is no list of tasks"),
        ({"gate": "hard", "num_experts": 4}, "4 experts for tasks"),
        ({"gate": "sparse", "top_k": 6}, "top_k 6 asks for more than the 5 experts"),
    ],
)
def test_gates_that_cannot_be_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        moe(**options)


def test_mixed_precision():
    for gate in GATES:
        connector = moe(gate=gate)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = connector(features_on((4, 4)), torch.tensor([0, 1]))
        exact = connector(features_on((4, 4)), torch.tensor([0, 1]))
        assert (
            torch.nn.functional.cosine_similarity(output.float().flatten(), exact.flatten(), dim=0)
            > 0.99
        )
