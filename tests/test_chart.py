"""The Helm chart: what it renders is valid by Kubernetes' own schemas, and its Pods have few privileges. No cluster."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_assets.containers.stack import requirements
from model.errors import PipelineError

REPO = Path(__file__).resolve().parents[1]
CHART = REPO / "deploy" / "chart"
RAY_SERIES = "2.60"
"""Of the extra ray, which pyproject.toml pins."""


def is_installed() -> bool:
    try:
        import helm_python
        import kubernetes_validate
    except ImportError:
        return False
    return bool(helm_python and kubernetes_validate)


rendering = pytest.mark.skipif(not is_installed(), reason="the extra cluster (Helm) is not installed: make cluster")


def render(**values: Any) -> list[dict[str, Any]]:
    from helm_python.chart import Chart

    with Chart.load(str(CHART)) as chart:
        files = chart.render(values=values, name="demo", namespace="rex")
    return [document for text in files.values() for document in yaml.safe_load_all(text) if document]


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        if document["kind"] in ("Deployment", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]


def named(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, f"demo-{name}"))


@rendering
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"generate": {"enabled": False}, "networkPolicy": {"enabled": False}},
        {
            "image": {"pullSecrets": ["one", "two"]},
            "s3": {"endpoint": "http://s3.example.org:8333"},
            "runs": {"nodeSelector": {"gpu": "true"}, "resources": {"limits": {"nvidia.com/gpu": 1}}},
            "ray": {"enabled": True},
            "generate": {"callers": {"team": "web"}, "service": {"type": "LoadBalancer", "port": 443}},
        },
    ],
    ids=["defaults", "without the service", "everything else"],
)
def test_what_the_chart_renders_is_valid(values):
    import kubernetes_validate

    documents = render(**values)
    for document in documents:
        if document["kind"] != "RayCluster":  # KubeRay's, which the next test covers
            kubernetes_validate.validate(document, "1.37", strict=True)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(names) == len(set(names)) > 10


@rendering
def test_a_ray_cluster_is_rendered_on_demand_and_shares_its_files_with_runs():
    import kubernetes_validate

    assert not [document for document in render() if document["kind"] == "RayCluster"]
    documents = render(ray={"enabled": True, "claim": "shared", "workers": {"replicas": 3}})
    cluster = named(documents, "RayCluster", "ray")
    assert (cluster["apiVersion"], cluster["spec"].keys()) == (
        "ray.io/v1",
        {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
    )
    assert cluster["spec"]["rayVersion"].startswith(RAY_SERIES)
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (3, 3, 3)
    policy = named(documents, "NetworkPolicy", "ray")["spec"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray", **group["template"]["metadata"]}}
        pod["spec"] = group["template"]["spec"]
        kubernetes_validate.validate(pod, "1.37", strict=True)
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["automountServiceAccountToken"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] and "memory" in container["resources"]["limits"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert {"secretRef": {"name": "rex-ray"}} in container["envFrom"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert mounts.keys() == volumes.keys() and mounts["shared"] == "/var/lib/rex"
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "shared"}
    config = yaml.safe_load(named(documents, "ConfigMap", "dagster")["data"]["dagster.yaml"])
    runs = config["run_launcher"]["config"]["run_k8s_config"]
    assert {"name": "scratch", "persistent_volume_claim": {"claim_name": "shared"}} in runs["pod_spec_config"][
        "volumes"
    ]
    assert {"name": "scratch", "mount_path": "/var/lib/rex"} in runs["container_config"]["volume_mounts"]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in runs["container_config"]["env"]
    assert "rex-ray" in config["run_launcher"]["config"]["env_secrets"]


@rendering
def test_pods_are_not_root_and_name_their_resources():
    found = list(pods(render()))
    assert len(found) == 6
    for name, template in found:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["automountServiceAccountToken"] is (name in ("demo-webserver", "demo-daemon")), name
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name


@rendering
def test_services_and_policies_select_the_pods_of_their_deployment():
    documents = render()
    for document in documents:
        name = document["metadata"]["name"].removeprefix("demo-")
        if document["kind"] in ("Service", "PodDisruptionBudget") or (
            document["kind"] == "NetworkPolicy" and name != "closed"
        ):
            spec = document["spec"]
            chosen = spec.get(
                "podSelector", spec["selector"] if document["kind"] == "Service" else spec.get("selector")
            )
            wanted = chosen.get("matchLabels", chosen)
            labels = named(documents, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
            assert wanted.items() <= labels.items(), name
    scaler = named(documents, "HorizontalPodAutoscaler", "generate")["spec"]
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    assert f'"{metric}"' in (REPO / "bento" / "telemetry" / "metrics.py").read_text()
    assert "replicas" not in named(documents, "Deployment", "generate")["spec"]  # the autoscaler's


@rendering
@pytest.mark.medium
@pytest.mark.parametrize("ray", [False, True], ids=["alone", "with Ray"])
def test_dagster_reads_its_configuration_and_starts_runs_as_jobs(ray):
    pytest.importorskip("dagster_k8s", reason="the extra kubernetes is not installed: make cluster")
    from dagster._config import process_config, resolve_to_config_type
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.job import UserDefinedDagsterK8sConfig

    config = yaml.safe_load(named(render(ray={"enabled": ray}), "ConfigMap", "dagster")["data"]["dagster.yaml"])
    launcher = config["run_launcher"]
    assert launcher["class"] == K8sRunLauncher.__name__
    checked = process_config(resolve_to_config_type(K8sRunLauncher.config_type()), launcher["config"])
    assert checked.success, checked.errors
    run = UserDefinedDagsterK8sConfig.from_dict(launcher["config"]["run_k8s_config"])
    names = {variable["name"] for variable in run.container_config["env"]}
    assert {"POSTGRES_PASSWORD", "LLM_ASSETS_ARTIFACTS", "MLFLOW_TRACKING_URI"} <= names


def test_every_value_has_its_meaning_beside_it():
    lines = (CHART / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*\w+:", line):
            assert " # " in line or lines[number - 1].lstrip().startswith("#"), line


def test_the_image_has_the_extras_that_the_chart_needs():
    wanted = requirements("cpu", ["s3", "kubernetes", "ray"])
    assert any(one.startswith("s3fs") for one in wanted) and any(one.startswith("dagster-k8s") for one in wanted)
    assert any(one.startswith(f"ray>={RAY_SERIES}") for one in wanted)
    with pytest.raises(PipelineError, match="--extra is 'k8s': expected one of "):
        requirements("cpu", ["k8s"])
