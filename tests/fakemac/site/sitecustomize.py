"""Python imports this by itself when it starts; with FAKEMAC=1 it then runs on a pretended Mac."""

import os

if os.environ.get("FAKEMAC") == "1":
    import fakemac_metal
    import fakemac_system

    fakemac_system.pretend()
    fakemac_metal.pretend()
