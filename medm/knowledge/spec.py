"""Graph data: named nodes, edges and groups. Torch-free and without files."""

from __future__ import annotations

import random

from pydantic import Field, model_validator

from medm.config import Options


class GraphSpec(Options):
    """A graph of names, as the config of a checkpoint holds it."""

    nodes: list[str] = Field(min_length=1)
    """Names of the nodes. A model reads them as text."""
    edges: list[list[int]] = []
    """Pairs of positions in `nodes`, without direction."""
    groups: dict[str, list[int]] = {}
    """Group name to the positions of its nodes. A node can be in several groups, or in none."""

    @model_validator(mode="after")
    def _consistent(self) -> GraphSpec:
        if blank := [number for number, name in enumerate(self.nodes) if not name.strip()]:
            raise ValueError(f"nodes: expected a name, found blank text at {blank[0]}")
        if twice := sorted({name for name in self.nodes if self.nodes.count(name) > 1}):
            raise ValueError(f"nodes: {twice[0]!r} stands twice; name each node once")
        known = range(len(self.nodes))
        for edge in self.edges:
            if len(edge) != 2 or not all(end in known for end in edge) or edge[0] == edge[1]:
                raise ValueError(
                    f"edges: expected two different positions below {len(known)}, found {edge}"
                )
        for group, members in self.groups.items():
            if not members or not all(member in known for member in members):
                raise ValueError(
                    f"groups.{group}: expected positions below {len(known)}, found {members}"
                )
        return self

    def connected(self) -> list[list[bool]]:
        """Return which nodes attend to each other, (K, K): itself, an edge, or a common group."""
        size = len(self.nodes)
        rows = [[row == column for column in range(size)] for row in range(size)]
        pairs = [tuple(edge) for edge in self.edges]
        pairs += [(a, b) for members in self.groups.values() for a in members for b in members]
        for a, b in pairs:
            rows[a][b] = rows[b][a] = True
        return rows

    def shuffled(self, seed: int) -> GraphSpec:
        """Return the same shape with the names at other places: a control experiment.

        Every node gets another name wherever the graph has more than one.
        """
        order = list(range(len(self.nodes)))
        random.Random(seed).shuffle(order)
        # One cycle through the shuffled order: no name can stay.
        moved = dict(zip(order, order[1:] + order[:1], strict=True))
        nodes = [self.nodes[moved[place]] for place in range(len(self.nodes))]
        return GraphSpec(nodes=nodes, edges=self.edges, groups=self.groups)
