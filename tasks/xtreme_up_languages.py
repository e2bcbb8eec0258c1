"""Which languages XTREME-UP has in each task, and which of them a task's score averages over.

The files of each task are those of the release (arXiv 2305.11938, v1.1), named as there. The
benchmark calls a language under-represented unless it is one of 25 well-represented ones; the
score of a task is the mean over its under-represented languages. Completed from the lists of the
scorer published with it (github.com/google-research/xtreme-up, evaluation/constants.py); counts
agree with the paper's: translation 93 (70), speech 102 (77).
"""

from __future__ import annotations

from collections.abc import Mapping

WELL_REPRESENTED = frozenset(
    "ar ca cmn cs de en es fa fi fr hi hr hu it ja ko nl pl pt ru sr sv tr vi zh".split()
)
CODE_SWITCHED = ("bn_cs", "hi_cs", "ta_cs")

_QA_IN_LANG = "ar bn en fi id ko ru sw te"
_QA_CROSS_LANG = (
    "ar as bho bn brx fi gbm gom gu hi hne kn ko mai ml mni mr mwr or pa ps ru sa ta te ur"
)
_NAMED_BY_LANGUAGE = {
    "ner": "am bbj bm ee ha ig lg luo mos ny pcm rw sn sw tn tw wo xh yo zu",
    "semantic_parsing": (
        "am be bn bn_cs de de_localized en es fi fr ha hi hi_cs hu ja pt_br ru sw ta ta_cs th tr "
        "yo zu"
    ),
    "qa_in_lang": _QA_IN_LANG,
    "qa_cross_lang": _QA_CROSS_LANG,
    "retrieval_in_lang": _QA_IN_LANG,
    "retrieval_cross_lang": _QA_CROSS_LANG,
    "autocomplete": "be bg da el en et eu ga gd gl he hy id is lt lv pcm ro sk sl ug uk ur",
    "asr": (
        "af_za am_et ar_eg as_in ast_es az_az be_by bn_in bs_ba ca_es ceb ckb_iq cmn_hans_cn "
        "cmn_hant_hk cs_cz cy_gb da_dk de_de el_gr en_us es_419 et_ee fa_ir ff_sn fi_fi fil_ph "
        "fr_fr ga_ie gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id ig_ng is_is it_it "
        "ja_jp jv_id ka_ge kam_ke kea_cv kk_kz km_kh kn_in ko_kr ky_kg lb_lu lg_ug ln_cd lo_la "
        "lt_lt luo_ke lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm nb_no ne_np nl_nl "
        "nso_za ny_mw oc_fr om_et or_in pa_in pl_pl ps_af pt_br ro_ro ru_ru rup_bg sd_arab_in "
        "sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua umb_ao "
        "ur_pk uz_uz vi_vn wo_sn xh_za yo_ng zu_za"
    ),
}
_TRANSLATION = (
    "af am ar as az be bg bn bs ca ceb ckb cs cy da de el es et fa ff fi fil fr ga gl gu ha he hi "
    "hr hu hy id ig is it ja jv ka kk km kn ko ky lb lg ln lo lt lv mi mk ml mn mr ms mt my ne nl "
    "no nso ny om or pa pl ps pt ro ru sd sk sl sn so sr sv sw ta te tg th tr uk ur uz vi xh yo zh "
    "zu"
)
_TRANSLITERATION = (  # every pair in both directions
    "am:Latn:Ethi bn:Latn:Beng gu:Latn:Gujr hi:Latn:Deva kn:Latn:Knda ml:Latn:Mlym mr:Latn:Deva "
    "pa:Latn:Guru pa:Arab:Guru pa:Latn:Arab sd:Latn:Arab si:Latn:Sinh ta:Latn:Taml te:Latn:Telu "
    "ur:Latn:Arab"
)


def without_locale(code: str) -> str:
    """The language of a code with a locale, as the published scorer joins them over tasks.

    `af_za` -> `af`, `pt_br` -> `pt`; `cmn_hans_cn` -> `cmn_hans`, whose script is not a locale.
    """
    head, _, rest = code.partition("_")
    script = rest.partition("_")[0]
    return f"{head}_{script}" if script in ("hans", "hant") else head


def _files() -> dict[str, dict[str, str]]:
    files = {
        task: {name: name for name in names.split()} for task, names in _NAMED_BY_LANGUAGE.items()
    }
    files["semantic_parsing"]["pt_br"] = "pt"
    files["asr"] = {name: without_locale(name) for name in files["asr"]}
    files["translation"] = {f"en2{language}": language for language in _TRANSLATION.split()}
    files["transliteration"] = {}
    for entry in _TRANSLITERATION.split():
        language, *scripts = entry.split(":")
        for source, target in (scripts, scripts[::-1]):
            files["transliteration"][f"{source}2{target}.{language}"] = language
    return files


#: By task, the files of the release (without `.jsonl`) and the language of each.
FILES: Mapping[str, Mapping[str, str]] = _files()


def languages(task: str) -> tuple[str, ...]:
    """The languages of a task of the benchmark, sorted; none for a task that is not one of it."""
    return tuple(sorted(set(FILES.get(task, {}).values())))


def under_represented(task: str, language: str) -> bool | None:
    """Whether the score of `task` averages over `language`.

    Args:
      task: a folder of the release.
      language: as a cell names it (`af`), or the name of the file (`af_za`, `en2af`).

    Returns:
      None for a task that is not the benchmark's, or a language that it does not have in it. False
      for the code-switched files of semantic parsing, which no published score counts.
    """
    files = FILES.get(task, {})
    language = files.get(language, language)
    if language not in files.values():
        return None
    if language in CODE_SWITCHED:
        return False
    return language.partition("_")[0] not in WELL_REPRESENTED
