"""Public servers of a config file of Ray Serve."""

import pytest
from ray import serve

from trimtab.errors import UsageError
from trimtab.serve import app
from trimtab.serve.api_keys import AddConfig, run_keys_add
from trimtab.util import ports


@pytest.mark.usefixtures("cluster")
def test_public_http_options_of_config_file_require_keys(home):
    """In a config file of Ray Serve, `http_options` have the host, and the `args` of the application do not."""
    serve.start(http_options={"host": "0.0.0.0", "port": ports.find_free_ports()[0]})
    try:
        with pytest.raises(UsageError, match=r"the server on 0.0.0.0 would be open to other machines"):
            app.build_app({})
        run_keys_add(AddConfig("alice"))
        assert app.build_app({"cpus_per_replica": 1})
    finally:
        serve.shutdown()
