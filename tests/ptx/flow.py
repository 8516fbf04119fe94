"""Basic blocks, and the order in which threads that diverged meet again."""

from __future__ import annotations

from tests.ptx.parser import Entry, Instruction, Label


def is_end_of_block(instruction: Instruction) -> bool:
    """Whether a thread may go on elsewhere after it, or wait."""
    parts = instruction.opcode.split(".")
    return parts[0] in ("bra", "ret", "exit", "bar", "barrier") and parts[:2] != ["bar", "warp"]


class Flow:
    """The blocks of an entry by number, and ``rank``: the threads of the least rank run next.

    The order of ranks is topological, the blocks of a loop side by side and before its exits: so
    the least rank that a thread has is where the others meet it (thread frontiers, Diamos et al.,
    2011).
    """

    def __init__(self, entry: Entry):
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        for statement in entry.body:
            if isinstance(statement, Label):
                if self.blocks[-1]:
                    self.blocks.append([])
                self.labels[statement.name] = len(self.blocks) - 1
                continue
            self.blocks[-1].append(statement)
            if is_end_of_block(statement):
                self.blocks.append([])
        if self.blocks[-1]:
            self.blocks.append([])  # where threads are that ran past the end
        edges = {i: self._successors(i) for i in range(len(self.blocks))}
        self.order = _order(edges, list(edges), 0)
        self.rank = [0] * len(self.order)
        for rank, block in enumerate(self.order):
            self.rank[block] = rank

    def _successors(self, number: int) -> set[int]:
        block, after = self.blocks[number], set()
        falls = number + 1 < len(self.blocks)
        if block and block[-1].opcode.startswith("bra"):
            after.add(self.labels[block[-1].operands[0]])
        if block and block[-1].opcode.startswith(("bra", "ret", "exit")):
            falls &= block[-1].guard is not None
        return after | {number + 1} if falls else after


def _order(edges: dict[int, set[int]], nodes: list[int], entry: int) -> list[int]:
    order = []
    for component in _components(nodes, edges):
        if len(component) == 1:
            order += component
            continue
        # A loop: without the way back to its head it is ordered like the whole.
        inside = set(component)
        entered = {w for v in nodes if v not in inside for w in edges[v]}
        head = next((v for v in component if v == entry or v in entered), min(component))
        within = {v: {w for w in edges[v] if w in inside and w != head} for v in component}
        order += _order(within, [head, *(v for v in component if v != head)], head)
    return order


def _components(nodes: list[int], edges: dict[int, set[int]]) -> list[list[int]]:
    """Strongly connected components in topological order (Tarjan, 1972), without recursion."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    found: list[list[int]] = []
    closed: set[int] = set()
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(()))]
        while work:
            node, rest = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                path.append(node)
                rest = iter(sorted(edges[node]))
                work[-1] = node, rest
            for other in rest:
                if other not in index:
                    work.append((other, iter(())))
                    break
                if other not in closed:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    start = path.index(node)
                    found.append(path[start:])
                    closed.update(path[start:])
                    del path[start:]
    return found[::-1]
