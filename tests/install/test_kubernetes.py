"""The manifests of deploy/kubernetes: valid by Kubernetes' own schemas, and their commands by hetkv's own parser."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetkv.cli import serve

RENDER = Path(__file__).parents[2] / "deploy" / "kubernetes" / "render.py"
NEEDED = ["--image", "example.org/hetkv:1", "--model", "/models/m", "--claim", "models"]


def rendered(*options: str) -> list[dict[str, Any]]:
    made = subprocess.run([sys.executable, RENDER, *NEEDED, *options], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


@pytest.fixture(
    scope="module", params=[(), ("--prefill", "2xTP2", "--decode", "4xTP1PP2", "--gpu-resource", "amd.com/gpu")]
)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(*request.param)


def test_schemas(manifests: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for manifest in manifests:
        validate(manifest, "1.31", strict=True)
    manifests[0]["spec"]["porst"] = []
    with pytest.raises(Exception, match="porst"):
        validate(manifests[0], "1.31", strict=True)
    del manifests[0]["spec"]["porst"]


def test_commands(manifests: list[dict[str, Any]]) -> None:
    """What the pods run is what `hetkv serve` takes, and the instances join where the front's service is."""
    service = next(m for m in manifests if m["kind"] == "Service")
    deployments = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Deployment"}
    assert set(deployments) == {"hetkv-front", "hetkv-prefill", "hetkv-decode"}
    gate = f"{service['metadata']['name']}:{service['spec']['ports'][1]['port']}"
    for name, deployment in deployments.items():
        template = deployment["spec"]["template"]
        assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        (container,) = template["spec"]["containers"]
        command, *options = container["args"]
        assert command == "serve"
        parser = argparse.ArgumentParser(exit_on_error=False)
        serve.add_arguments(parser)
        args = parser.parse_args(options)
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert args.model in mounts
        assert str(Path(args.secret_file).parent) in mounts
        if name == "hetkv-front":
            assert args.none
            assert service["spec"]["selector"] == template["metadata"]["labels"]
            assert [port["containerPort"] for port in container["ports"]] == [args.port, int(args.gate.split(":")[1])]
        else:
            assert args.join == gate
            assert args.instance_host == "$(POD_IP)"


def test_counts() -> None:
    """`4xTP1` is four pods of one instance each; what is none is rejected."""
    found = rendered("--decode", "4xTP1", "--gpus", "0")
    decode = next(m for m in found if m["metadata"]["name"] == "hetkv-decode")
    assert decode["spec"]["replicas"] == 4
    assert "resources" not in decode["spec"]["template"]["spec"]["containers"][0]
    with pytest.raises(subprocess.CalledProcessError):
        rendered("--decode", "0xTP1")
