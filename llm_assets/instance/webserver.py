"""Dagster's webserver, whose graph shows what is out of date and names the options that made it so.

    python -m llm_assets.instance.webserver --port 3001 ...        with the options of dagster-webserver

Dagster knows for each partition whether it is out of date. Its graph and "Materialize unsynced" ask for the asset,
though, and the answer is always that a partitioned one is up to date. Here the answer is that of its partitions.
"""

from collections.abc import Sequence
from typing import Any

from dagster_graphql.schema.asset_graph import GrapheneAssetNode
from dagster_webserver.cli import main as run_webserver

from llm_assets.experiments.observed import changed_since

MAX_LISTED = 3
"""Changed options that a reason names."""
_stale_status, _stale_causes = GrapheneAssetNode.resolve_staleStatus, GrapheneAssetNode.resolve_staleCauses


def resolve_status(node: GrapheneAssetNode, info: Any, partition: str | None = None) -> Any:
    """The field `staleStatus`; without a partition, it is STALE if one of them is."""
    if partition is None and node.resolve_isPartitioned(info):
        for status in node.resolve_staleStatusByPartition(info):
            if status.name == "STALE":
                return status
    return _stale_status(node, info, partition)


def resolve_causes(node: GrapheneAssetNode, info: Any, partition: str | None = None) -> Sequence[Any]:
    """The field `staleCauses`; without a partition, the causes of all. Changed settings are named."""
    if not node.resolve_isPartitioned(info):
        return _stale_causes(node, info)
    found: list[Any] = []
    for experiment in [partition] if partition else node.resolve_partitionKeys(info):
        for cause in _stale_causes(node, info, experiment):
            if not partition:
                cause.reason += f" for {experiment}"
            if changed := changed_since(info.context.instance, node.assetKey.path, cause.key.path, experiment):
                more = f"; {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
                cause.reason += f": {'; '.join(changed[:MAX_LISTED])}{more}"
            found.append(cause)
    return found


def main() -> None:
    """Run the webserver."""
    setattr(GrapheneAssetNode, "resolve_staleStatus", resolve_status)  # noqa: B010 - mypy takes methods for constants
    setattr(GrapheneAssetNode, "resolve_staleCauses", resolve_causes)  # noqa: B010
    run_webserver()


if __name__ == "__main__":
    main()
