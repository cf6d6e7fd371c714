"""SGLang's disaggregated serving over hetkv: `--disaggregation-transfer-backend hetkv`.

`docs/other-engines.md` says how; SGLang finds `plugin` by its entry point. May import `hetkv.transport`,
`hetkv.integrations`, and SGLang, which is imported when `plugin` is called.
"""


def plugin() -> None:
    """Add the backend `hetkv` to SGLang. Raises `BuildError` for another version of it."""
    from hetkv.integrations.sglang.backend import register

    register()
