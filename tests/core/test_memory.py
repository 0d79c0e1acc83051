"""Free memory within control groups, of both versions."""

import pytest

from bnnlaplace.core import memory


def write(group, limit, used, cached, version):
    group.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    for name, value in zip(names, (limit, used), strict=True):
        (group / name).write_text(f"{value}\n")
    entry = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (group / "memory.stat").write_text(f"anon 5\n{entry} {cached}\n")


def available(tmp_path, text):
    groups = tmp_path / "groups"
    groups.write_text(text)
    return memory._control_group_available(groups, tmp_path / "mounted")


@pytest.mark.parametrize(("outer", "expected"), [("max", 710), (1000, 310)])
def test_the_smallest_of_nested_groups_counts(tmp_path, outer, expected):
    write(tmp_path / "mounted" / "job", outer, 700, 10, 2)
    write(tmp_path / "mounted" / "job" / "step", 800, 100, 10, 2)
    assert available(tmp_path, "0::/job/step\n") == expected


def test_first_version(tmp_path):
    write(tmp_path / "mounted" / "memory" / "job", 900, 100, 20, 1)
    assert available(tmp_path, "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n") == 820


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    write(tmp_path / "mounted", 600, 100, 0, 2)
    assert available(tmp_path, "0::/not/mounted/here\n") == 500


@pytest.mark.parametrize("text", ["", "0::/\n", "3:cpuset:/job\n"])
def test_no_limit(tmp_path, text):
    assert available(tmp_path, text) is None


def test_no_control_groups(tmp_path):
    assert memory._control_group_available(tmp_path / "none", tmp_path) is None


def test_this_machine_has_free_memory():
    assert memory.free_bytes() > 0
