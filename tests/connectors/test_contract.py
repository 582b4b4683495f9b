"""What every registered connector must do, on images and volumes, with and without tokens in front
of the grid."""

import pytest
import torch

from medm.connectors import CONNECTORS
from medm.connectors.base import Connector
from tests.connectors.tiny import (
    IN_DIM,
    OUT_DIM,
    TINY_CONNECTORS,
    build_connector,
    features_on,
)

every_connector = pytest.mark.parametrize("name", CONNECTORS.names())
every_grid = pytest.mark.parametrize(
    ("grid", "prefix"), [((4, 4), 0), ((4, 8), 1), ((2, 4, 4), 0), ((2, 4, 4), 1)]
)


def run(connector: Connector, features, tasks=(0, 1, 1, 0)):
    batch = len(features.tokens)
    return connector(features, torch.tensor(tasks[:batch]) if connector.needs_task else None)


def test_every_connector_has_a_tiny_block():
    assert set(TINY_CONNECTORS) == set(CONNECTORS.names())


@every_connector
@every_grid
def test_shapes_are_the_arithmetic_of_the_grid(name, grid, prefix):
    connector = build_connector(name, grid, prefix)
    assert run(connector, features_on(grid, prefix)).shape == (2, connector.num_tokens, OUT_DIM)


@every_connector
def test_every_cell_of_the_grid_changes_the_output(name):
    grid = (2, 4, 4)
    connector, features = build_connector(name, grid), features_on(grid, batch=1)
    tokens = features.tokens.requires_grad_()
    run(connector, features).square().sum().backward()
    assert tokens.grad.abs().sum(dim=-1).gt(0).all()


@every_connector
def test_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    connector, features = build_connector(name, (4, 4)), features_on((4, 4), batch=4)
    output = run(connector, features)
    (output * torch.randn_like(output)).sum().backward()
    silent = [
        key
        for key, value in connector.named_parameters()
        if value.grad is None or not value.grad.any()
    ]
    assert silent == []


@every_connector
def test_state_dict_round_trip(name):
    first, second = (build_connector(name, (4, 4)) for _ in range(2))
    features = features_on((4, 4))
    assert not torch.equal(run(first, features), run(second, features))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(run(first, features), run(second, features))


@every_connector
def test_items_of_a_batch_do_not_see_each_other(name):
    connector, features = build_connector(name, (4, 4)).eval(), features_on((4, 4), batch=4)
    together = run(connector, features)
    for i, task in enumerate((0, 1, 1, 0)):
        alone = run(connector, features._replace(tokens=features.tokens[i : i + 1]), tasks=(task,))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@every_connector
def test_bf16_stays_bf16_and_close(name):
    connector, features = build_connector(name, (4, 4)).eval(), features_on((4, 4))
    exact = run(connector, features)
    rough = run(
        connector.to(torch.bfloat16), features._replace(tokens=features.tokens.to(torch.bfloat16))
    )
    assert rough.dtype == torch.bfloat16
    assert (
        torch.nn.functional.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0)
        > 0.99
    )


@every_connector
def test_widths_are_told_and_nowhere_else(name):
    connector = build_connector(name, (4, 4))
    assert (connector.in_dim, connector.out_dim, connector.grid) == (IN_DIM, OUT_DIM, (4, 4))


@every_connector
@every_grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["cast", "autocast"])
def test_half_precision_works_on_a_cpu_forward_and_backward(name, grid, prefix, dtype, weights):
    """As DeepSpeed casts every weight, and as transformers' Trainer computes; torch lacks some
    kernels there."""
    connector, features = build_connector(name, grid, prefix), features_on(grid, prefix)
    exact = run(connector, features)
    connector = connector.to(dtype) if weights == "cast" else connector
    tokens = features.tokens.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=weights == "autocast"):
        out = run(connector, features._replace(tokens=tokens))
    out.float().square().sum().backward()
    torch.testing.assert_close(
        out.float(), exact, atol=0.05, rtol=0.05
    )  # measured 0.01; 8 bits of mantissa
    assert tokens.grad.isfinite().all() and tokens.grad.abs().sum() > 0
