"""Print the tables of a run at its end, and keep compiled programs of earlier runs out of it."""

import jax

from bench import harness

ROOT = harness.RESULTS.parent.parent
jax.config.update("jax_enable_compilation_cache", False)


def pytest_terminal_summary(terminalreporter):
    for table, rows in harness.TABLES.items():
        terminalreporter.section(
            f"{table} (appended to {harness.folder().relative_to(ROOT)}/{table}.csv)"
        )
        terminalreporter.write_line(harness.as_text(rows))
