from pathlib import Path

import pytest

from tests.many_machines.documented import one_machine, witnessed
from tests.many_machines.programs import Programs
from tests.many_machines.records import WITNESS, check_same_weights, facts


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of two processes on one machine."""
    folder = tmp_path_factory.mktemp("one machine")
    with Programs([one_machine(witnessed(folder))], [WITNESS], cwd=folder) as programs:
        output = programs.end(timeout=120)
    assert programs.returncodes == [0], output
    assert facts(folder, 1)["environment"] == "LightningEnvironment"
    check_same_weights(folder)
    return folder
