"""What a low-rank form is made of: one class each, registered by name. The first is that of every kind of layer."""

from functools import cache

from hf_drt.forms.kept import BASE, SCALE
from hf_drt.forms.products.cp import Cp
from hf_drt.forms.products.product import KernelProduct, Product, Source, TwoFactors
from hf_drt.forms.products.svd import Svd
from hf_drt.forms.products.tucker import Tucker
from hf_drt.registry import PRODUCTS
from hf_drt.tables import markdown_table

__all__ = ["Cp", "KernelProduct", "Product", "Source", "Svd", "Tucker", "TwoFactors", "product_table", "tensor_names"]

for _product in (Svd(), Tucker(), Cp()):
    PRODUCTS.add(_product.name, _product)


def product_table() -> str:
    """All products as a table in Markdown, as the documentation has it."""
    rows = [(f"`{p.name}`", p.help, p.weights, p.found_by) for p in PRODUCTS.values()]
    return markdown_table(("", "what it is", "weights", "found by"), rows)


def tensor_names() -> frozenset[str]:
    """Names of the tensors of all low-rank forms."""
    return _names(tuple(PRODUCTS))


@cache
def _names(products: tuple[str, ...]) -> frozenset[str]:
    own = (name for product in products for adapts in (False, True) for name in PRODUCTS[product].names(adapts))
    return frozenset((BASE, SCALE, *own))
