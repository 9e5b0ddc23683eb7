"""What the first pass over a shard leaves in memory for later ones, so that these need not differentiate the same examples again."""

from collections import deque
from collections.abc import Callable, Iterator

from attribution_core.curvature import Identity
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import Fisher, Observed
from attribution_core.data.batch import Batch
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.context import FitContext
from attribution_core.sharding import Shard

KEPT_BYTES = 128 << 20

# A shard's batches but for its first few examples, whose number is given.
Batches = Callable[[int], Iterator[Batch]]


class KeptGradients:
    """Gradients and draws of the first batches of each shard, in the smaller of their two forms.

    Args:
        limit: bytes kept of all shards together; `KEPT_BYTES` by default.
    """

    def __init__(self, context: FitContext, limit: int | None = None) -> None:
        self._context = context
        self._limit = KEPT_BYTES if limit is None else limit
        self._nbytes = 0
        self._kept: dict[int, list[Observed]] = {}

    def first_draws(self, shard: Shard, batches: Batches, fisher: Fisher) -> Iterator[Draws]:
        """Yield pseudo-gradients as factors, and keep all that later passes need while memory lasts."""
        for _ in self.released(shard):
            pass  # of an attempt that was broken off
        checkpoint = self._context.checkpoint(shard.checkpoint)
        observer = GradientMethod(checkpoint, Identity(), 0.0, None)  # differentiates, before there is a curvature
        kept, keeps = self._kept.setdefault(shard.ordinal, []), True
        for batch in batches(0):
            keeps = keeps and self._fits(shard, batch)
            if not keeps:
                yield fisher.draws(checkpoint.run(batch), checkpoint.task, batch, checkpoint.run)
                continue
            observed = observer.observe(batch, fisher)
            yield observed.draws
            kept.append(observed.compact())
            self._nbytes += kept[-1].nbytes

    def later_draws(
        self, shard: Shard, batches: Batches, fisher: Fisher, advance: Callable[[int], None]
    ) -> Iterator[Draws]:
        """Yield pseudo-gradients in the form they are kept in, whether they were or not: no rounding error then depends on memory."""
        kept, checkpoint = self._kept.get(shard.ordinal, ()), self._context.checkpoint(shard.checkpoint)
        for observed in kept:
            yield observed.draws
            advance(len(observed))
        for batch in batches(sum(map(len, kept))):
            yield fisher.draws(checkpoint.run(batch), checkpoint.task, batch, checkpoint.run).compact()

    def released(self, shard: Shard) -> Iterator[Observed]:
        """Yield what was kept of a shard, and forget it on the way."""
        kept = deque(self._kept.pop(shard.ordinal, ()))
        while kept:
            self._nbytes -= kept[0].nbytes
            yield kept.popleft()

    def _fits(self, shard: Shard, batch: Batch) -> bool:
        return self._nbytes + self._context.kept_bytes(shard.checkpoint) * len(batch) <= self._limit
