"""Where bytes come from: files and folders, the hub, packages, the built-in base, what is shipped.

    files        reading JSON and safetensors; folders that appear whole or not at all
    fetch, disk  packages that hold data, once, with their checksums; room for them
    base_model   the built-in base, out of a package; bases by their short names
    shipped      the experts and models that come with xloom

Knows nothing of what the bytes mean.
"""
