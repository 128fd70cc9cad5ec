"""No kernel leaves its memory: a short run of sanitize.py, whose long one is a command."""

import sanitize


def test_sanitizers_find_nothing(tmp_path):
    # What compiles soonest; other vectors and precisions are left to the command.
    flags = *sanitize.SANITIZE, "-O0", "-fno-sanitize=null,alignment"
    library = sanitize.build_kernels(tmp_path, "float32", *flags)
    driver = sanitize.build_driver(tmp_path, sanitize.SANITIZE)
    assert sanitize.run(driver, library, "float32", "plain", shapes=4) == 76
