"""Integrations with other libraries' models; import the package as `retention.integrations`."""

if __name__ != "retention.integrations":
    raise ImportError(f"import retention.integrations, not {__name__}: pyproject.toml maps the folder there")
