"""The launch recipes are what their programs read; no cluster is here to run them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml

from experiments.configs.ssd_digits import Config

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
SLURM, JOBSET = RECIPES / "slurm.sh", RECIPES / "jobset.yaml"


def check_shell(text):
    done = subprocess.run(
        ["bash", "-n"], input=text, text=True, capture_output=True, timeout=10
    )
    assert done.returncode == 0, done.stderr


def flags_of(text):
    """Returns the settings that the one command of an experiment gives."""
    text = text.replace("\\\n", " ")
    (command,) = re.findall(r"python -m experiments\.ssd_digits ([^;|\n]*)", text)
    command = re.sub(r'"\$\{resume\[@\]\}"|\$resume', "--resume", command)
    args = shlex.split(command.replace("$run", "/run"))
    return tyro.cli(Config, args=args)


def test_slurm():
    text = SLURM.read_text()
    check_shell(text)
    options = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node"} <= {*options}
    assert text.index("#SBATCH") < text.index("set -euo"), "sbatch reads no further"
    settings = flags_of(text)
    assert settings.distributed
    assert settings.mesh == "data=-1"


def test_jobset():
    account, role, binding, jobset = yaml.safe_load_all(JOBSET.read_text())
    kinds = [x["kind"] for x in (account, role, binding, jobset)]
    assert kinds == ["ServiceAccount", "Role", "RoleBinding", "JobSet"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (job,) = [x["template"]["spec"] for x in jobset["spec"]["replicatedJobs"]]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    (script,) = container["args"]
    check_shell(script)
    settings = flags_of(script)
    assert settings.distributed
    num_gpus = job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    data, fsdp = re.fullmatch(r"data=(\d+),fsdp=(\d+)", settings.mesh).groups()
    assert int(data) * int(fsdp) == num_gpus


@pytest.mark.parametrize("recipe", [SLURM, JOBSET], ids=lambda path: path.name)
def test_a_recipe_stands_on_the_page(recipe):
    page = RECIPES.parent / "guides" / "clusters.md"
    assert f"../recipes/{recipe.name}" in page.read_text()
