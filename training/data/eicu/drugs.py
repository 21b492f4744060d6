"""Drug names of eICU: hospitals write them freely, with package, strength, route and form.

"2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN", "ondansetron (ZOFRAN) injection 4 mg" and
"Ondansetron" are one drug.
"""

from __future__ import annotations

import polars as pl

_BLANK = r"[\s\u{a0}]+"
_PACKAGE_BEFORE = r"^[\d.,]+ ?(?:ml|l|g|gm|mg|mcg|ea|each|unit)\b[^:]*?(?: - | ?: )"
_PACKAGE_AFTER = r" : .*$"
_BRACKETS = r"\([^()]*\)?"
_LEADING_DOSE = r"^(?:volume[ -]+)?(?:[\d.,/]+ ?(?:%|mg|mcg|gm?|ml|l|meq|units?)?[ -]+)*"
# Whatever follows the first strength is strength, volume, form or route.
_DOSE = r"[ ,]+[.]?\d.*$"
_FORM = (
    r"\b(?:tab|tabs|tablet|tablets|tbec|cap|caps|capsule|capsules|inj|inject|injection|injectable|"
    r"soln|solution|solr|solp|syr|syringe|vial|bag|bottle|amp|ampul|ampule|iv|ivp|ivpb|po|im|sc|sq|"
    r"subq|sub-q|subcutaneous|ij|oral|susp|suspension|premix|pmx|piggyback|infusion|infused|drip|"
    r"bolus|ivf|prn|chew|chewable|ec|er|sa|xl|xr|cr|dr|pf|hcl|hydrochloride|orderable|variable|dose)\b"
)
_NOT_A_WORD = r"[^a-z0-9/+&' -]+"
_LEFT_OVER = r"(?: (?:in|with|w|w/|of|and|per|a|i))+$"


def drug_name(text: pl.Expr) -> pl.Expr:
    """The drug alone: lower case, without package, strength, volume, form, route and brackets.

    Never empty for a text that is not blank: if nothing would be left, the text in lower case.
    """
    whole = text.str.to_lowercase().str.replace_all(_BLANK, " ").str.strip_chars()
    name = (
        whole.str.replace(_PACKAGE_BEFORE, "")
        .str.replace(_PACKAGE_AFTER, "")
        .str.replace_all(_BRACKETS, " ")
        .str.strip_chars()
        .str.replace(_LEADING_DOSE, "")
        .str.replace(_DOSE, "")
        .str.replace_all(_FORM, " ")
        .str.replace_all(_NOT_A_WORD, " ")
        .str.replace_all(" +", " ")
        .str.strip_chars(" -/'&+")
        .str.replace(_LEFT_OVER, "")
        .str.strip_chars(" -/'&+")
    )
    return pl.when(name.str.contains("[a-z]")).then(name).otherwise(whole)
