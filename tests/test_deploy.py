"""What a platform runs the server with: images, manifests, compose, batch script and monitoring say what the server understands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import pytest
import yaml

from medai_nb.cli import build_parser
from medai_nb.serve import OPEN_ROUTES, ROUTE_ROLES, Metrics
from medai_nb.serving_config import ServingConfig

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = [
    manifest
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
    if manifest["kind"] != "Kustomization"
]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed: it belongs to the extra `dev`"
    return found


def manifest_of(kind: str) -> dict:
    return next(manifest for manifest in MANIFESTS if manifest["kind"] == kind)


def test_hadolint_has_nothing_to_say_about_the_images():
    said = subprocess.run([tool("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


def test_the_images_are_pinned_run_without_root_and_are_asked_without_a_key():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases == ["python:${PYTHON}", "python:${PYTHON}", "cpu"]
    assert re.fullmatch(r"ARG PYTHON=\d+\.\d+\.\d+-\S+", next(line for line in lines if "ARG PYTHON" in line))
    assert "USER 10001:10001" in lines
    assert any(OPEN_ROUTES[0] in line and "urlopen" in line for line in lines)


def test_what_the_images_are_built_from_is_let_through_and_is_there():
    root = DEPLOY.parent
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        name
        for line in (DEPLOY / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    ]
    assert len(copied) > 8
    for name in copied:
        assert (root / name).exists() and f"!{name}" in allowed, name


def commands() -> list[list[str]]:
    """The arguments of `medai` in the image, the deployment and the batch script."""
    image = re.search(r"^CMD (\[.*\])", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    container = manifest_of("Deployment")["spec"]["template"]["spec"]["containers"][0]
    script = re.search(
        r"^medai (serve .*?) &$", (DEPLOY / "slurm" / "serve.sbatch").read_text(), re.MULTILINE
    )
    values = {'"$RELEASE"': "/release", '"$PORT"': "8000", '"$STATE"': "/state"}
    return [
        json.loads(image[1]),
        container["args"],
        [values.get(word, word) for word in script[1].split()],
    ]


@pytest.mark.parametrize("arguments", commands(), ids=["image", "Kubernetes", "SLURM"])
def test_the_command_is_one_that_the_server_understands(arguments):
    options = build_parser().parse_args(arguments)
    assert options.port == 8000 and options.state_folder == "/state"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[one["kind"] for one in MANIFESTS])
def test_every_manifest_is_valid_for_kubernetes(manifest):
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_all_manifests_are_applied_and_what_they_name_is_there():
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    files = {file.name for file in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert set(listed) == files - {"kustomization.yaml"}
    pod = manifest_of("Deployment")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
    made = {(one["kind"], one["metadata"]["name"]) for one in MANIFESTS}
    for volume in volumes.values():
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in made
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made
    assert not any(one["kind"] == "Secret" for one in MANIFESTS), "a secret does not stand in a repository"


def test_the_pod_may_do_nothing_that_it_does_not_need():
    pod = manifest_of("Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"] and container["resources"]["requests"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_ROUTES
    asked = re.search(r"127\.0\.0\.1:8000(/[a-z/]+)", container["readinessProbe"]["exec"]["command"][-1])[1]
    assert asked in ROUTE_ROLES and ROUTE_ROLES[asked] is None
    policy = manifest_of("NetworkPolicy")["spec"]
    assert policy["egress"] == [] and set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_the_server_ends_before_it_is_killed():
    drains = ServingConfig().drain_timeout
    assert manifest_of("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drains
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert int(compose["services"]["medai"]["stop_grace_period"].removesuffix("s")) > drains
    seconds = re.search(r"--signal=B:TERM@(\d+)", (DEPLOY / "slurm" / "serve.sbatch").read_text())[1]
    assert int(seconds) > drains


def test_the_settings_of_the_cluster_are_settings_of_the_server():
    settings = yaml.safe_load(manifest_of("ConfigMap")["data"]["serving.yaml"])
    served = ServingConfig(**settings)
    assert (served.phi_input, served.phi_output, served.safety) == ("redact", "redact", "refuse")


def test_compose_opens_ports_to_this_machine_alone_and_mounts_what_is_there():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "latest" not in service["image"] and ":" in service["image"], name
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_file(), source
    assert services["medai"]["read_only"] and services["medai"]["cap_drop"] == ["ALL"]


def test_the_batch_script_is_clean():
    script = DEPLOY / "slurm" / "serve.sbatch"
    for command in (["bash", "-n"], [tool("shellcheck"), "--severity=style"]):
        said = subprocess.run([*command, script], capture_output=True, text=True)
        assert (said.returncode, said.stdout) == (0, "")


def asked_metrics() -> list[str]:
    """Every PromQL expression of rules and dashboard."""
    rules = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-rules.yaml").read_text())
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana-dashboard.json").read_text())
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return asked + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_rules_and_dashboard_ask_for_figures_and_labels_that_the_server_has():
    state = SimpleNamespace(queued=0, running=0, ready=True, restarts=0)
    described = Metrics(state).text().decode()
    kinds = dict(re.findall(r"^# TYPE (medai_\w+) (\w+)$", described, re.MULTILINE))
    offered = set(kinds) | {f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram"}
    asked = {name for expression in asked_metrics() for name in re.findall(r"\bmedai_\w+", expression)}
    assert len(asked) >= 10 and asked <= offered, asked - offered
    compose_rules = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yaml").read_text())["rule_files"]
    assert all((DEPLOY / "monitoring" / name).is_file() for name in compose_rules)
