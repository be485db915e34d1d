"""The languages layalign knows, one per line: name|ISO 639-1|ISO 639-3|M2M100 code|NLLB code|other names and codes.

Every language of M2M100 (100) and of NLLB-200 is here, and those of the public pair collections that are often used for
the translation stage. Where one code names a group of languages (sw, zh, ar, ne, ...), its usual member is on the same
line, so that "swa" and "swh" are both Swahili. An empty field means that there is no such code.

Source: the ISO 639 tables; the lists of codes in transformers' M2M100 and NLLB tokenizers. "Flemish" and not "Dutch" is
the name that the published LayAlign code uses for nl.
"""

TABLE = """\
Abkhaz|ab|abk
Acehnese||ace||ace_Latn
Acholi||ach
Adyghe||ady
Afar|aa|aar
Afrikaans|af|afr|af|afr_Latn
Akan|ak|aka||aka_Latn
Albanian|sq|sqi|sq|als_Latn|als
Algerian Arabic||arq
Alur||alz
Amharic|am|amh|am|amh_Ethi
Arabic|ar|ara|ar|arb_Arab|Standard Arabic, Modern Standard Arabic, arb
Armenian|hy|hye|hy|hye_Armn
Assamese|as|asm||asm_Beng
Assyrian Neo-Aramaic||aii
Asturian||ast|ast|ast_Latn
Avar|av|ava
Awadhi||awa||awa_Deva
Aymara|ay|aym||ayr_Latn|ayr
Azerbaijani|az|aze|az|azj_Latn|North Azerbaijani, azj
Balinese||ban||ban_Latn
Balochi||bal
Bambara|bm|bam||bam_Latn
Banjar||bjn||bjn_Latn
Baoulé||bci
Bashkir|ba|bak|ba|bak_Cyrl
Basque|eu|eus||eus_Latn
Batak Karo||btx
Batak Simalungun||bts
Batak Toba||bbc
Belarusian|be|bel|be|bel_Cyrl
Bemba||bem||bem_Latn
Bengali|bn|ben|bn|ben_Beng
Berber||ber
Betawi||bew
Bhojpuri||bho||bho_Deva
Bikol||bik
Bodo||brx
Bosnian|bs|bos|bs|bos_Latn
Breton|br|bre|br
Buginese||bug||bug_Latn
Bulgarian|bg|bul|bg|bul_Cyrl
Burmese|my|mya|my|mya_Mymr|Myanmar
Buryat||bua
Cantonese||yue||yue_Hant|Yue Chinese
Catalan|ca|cat|ca|cat_Latn|Valencian
Cebuano||ceb|ceb|ceb_Latn
Central Atlas Tamazight||tzm||tzm_Tfng
Central Kurdish||ckb||ckb_Arab|Sorani
Chamorro|ch|cha
Chavacano||cbk
Chechen|ce|che
Chhattisgarhi||hne||hne_Deva
Chichewa|ny|nya||nya_Latn|Nyanja
Chiga||cgg
Chinese|zh|zho|zh|zho_Hans|Mandarin, Mandarin Chinese, Simplified Chinese, zh-CN, zho-CN, zh-Hans, zho-Hans, cmn
Chittagonian||ctg
Chokwe||cjk||cjk_Latn
Chuukese||chk
Chuvash|cv|chv
Coastal Kadazan||kzj
Cornish|kw|cor
Crimean Tatar||crh||crh_Latn
Croatian|hr|hrv|hr|hrv_Latn
Czech|cs|ces|cs|ces_Latn
Danish|da|dan|da|dan_Latn
Dari||prs||prs_Arab|fa-AF
Dhivehi|dv|div
Dinka||din||dik_Latn|dik
Dogri||doi
Dombe||dov
Dyula||dyu||dyu_Latn
Dzongkha|dz|dzo||dzo_Tibt
Eastern Huasteca Nahuatl||nhe
Eastern Mari||mhr
Efik||efi
Egyptian Arabic||arz||arz_Arab
English|en|eng|en|eng_Latn
Esperanto|eo|epo||epo_Latn
Estonian|et|est|et|est_Latn
Ewe|ee|ewe||ewe_Latn
Faroese|fo|fao||fao_Latn
Fijian|fj|fij||fij_Latn
Finnish|fi|fin|fi|fin_Latn
Flemish|nl|nld|nl|nld_Latn|Dutch
Fon||fon||fon_Latn
French|fr|fra|fr|fra_Latn
French-based creoles||cpf
Frisian|fy|fry|fy||Western Frisian
Friulian||fur||fur_Latn
Fula|ff|ful|ff|fuv_Latn|Fulah, Fulfulde, fuv
Ga||gaa
Galician|gl|glg|gl|glg_Latn
Georgian|ka|kat|ka|kat_Geor
German|de|deu|de|deu_Latn
Goan Konkani||gom
Greek|el|ell|el|ell_Grek|Modern Greek
Greenlandic|kl|kal|||Kalaallisut
Guarani|gn|grn||grn_Latn
Gujarati|gu|guj|gu|guj_Gujr
Haitian Creole|ht|hat|ht|hat_Latn|Haitian
Hakha Chin||cnh
Hausa|ha|hau|ha|hau_Latn
Hebrew|he|heb|he|heb_Hebr|iw
Hiligaynon||hil
Hindi|hi|hin|hi|hin_Deva
Hungarian|hu|hun|hu|hun_Latn
Hunsrik||hrx
Iban||iba
Icelandic|is|isl|is|isl_Latn
Ido|io|ido
Igbo|ig|ibo|ig|ibo_Latn
Ilocano||ilo|ilo|ilo_Latn
Indonesian|id|ind|id|ind_Latn|in
Interlingua|ia|ina
Interlingue|ie|ile
Inuktitut|iu|iku
Irish|ga|gle|ga|gle_Latn|Irish Gaelic
Isoko||iso
Italian|it|ita|it|ita_Latn
Jamaican Patois||jam
Japanese|ja|jpn|ja|jpn_Jpan
Javanese|jv|jav|jv|jav_Latn|jw
Jingpho||kac||kac_Latn|Kachin
K'iche'||quc
Kabardian||kbd
Kabiyè||kbp||kbp_Latn
Kabuverdianu||kea||kea_Latn
Kabyle||kab||kab_Latn
Kadazan Dusun||dtp
Kamba||kam||kam_Latn
Kannada|kn|kan|kn|kan_Knda
Kanuri|kr|kau||knc_Latn|knc
Kapampangan||pam
Karakalpak||kaa
Kashmiri|ks|kas||kas_Arab
Kashubian||csb
Kazakh|kk|kaz|kk|kaz_Cyrl
Kedah Malay||meo
Khasi||kha
Khmer|km|khm|km|khm_Khmr
Kikuyu|ki|kik||kik_Latn
Kimbundu||kmb||kmb_Latn
Kinyarwanda|rw|kin||kin_Latn
Kirundi|rn|run||run_Latn|Rundi
Kituba||ktu
Kokborok||trp
Komi|kv|kom
Kongo|kg|kon||kon_Latn
Korean|ko|kor|ko|kor_Hang
Krio||kri
Kurdish|ku|kur||kmr_Latn|Northern Kurdish, Kurmanji, kmr
Kyrgyz|ky|kir||kir_Cyrl|Kirghiz
Lao|lo|lao|lo|lao_Laoo
Latgalian||ltg||ltg_Latn
Latin|la|lat
Latvian|lv|lav|lv|lvs_Latn|Standard Latvian, lvs
Libyan Arabic||ayl
Ligurian||lij||lij_Latn
Limburgish|li|lim||lim_Latn|Limburgan
Lingala|ln|lin|ln|lin_Latn
Lingua Franca Nova||lfn
Lithuanian|lt|lit|lt|lit_Latn
Lombard||lmo||lmo_Latn
Low German||nds
Lower Sorbian||dsb
Luba-Katanga|lu|lub
Luba-Lulua||lua||lua_Latn
Luganda|lg|lug|lg|lug_Latn|Ganda
Luo||luo||luo_Latn
Luxembourgish|lb|ltz|lb|ltz_Latn
Macedonian|mk|mkd|mk|mkd_Cyrl
Madurese||mad
Magahi||mag||mag_Deva
Maithili||mai||mai_Deva
Makassarese||mak
Malagasy|mg|mlg|mg|plt_Latn|Plateau Malagasy, plt
Malay|ms|msa|ms|zsm_Latn|Standard Malay, zsm
Malayalam|ml|mal|ml|mal_Mlym
Maltese|mt|mlt||mlt_Latn
Mam||mam
Manx|gv|glv
Maori|mi|mri||mri_Latn|Māori
Mapudungun||arn
Marathi|mr|mar|mr|mar_Deva
Mari||chm
Marshallese|mh|mah
Marwari||mwr
Mauritian Creole||mfe
Meitei||mni||mni_Beng|Manipuri
Mesopotamian Arabic||acm||acm_Arab
Minangkabau||min||min_Latn
Mizo||lus||lus_Latn|Lushai
Mongolian|mn|mon|mn|khk_Cyrl|Halh Mongolian, khk
Moroccan Arabic||ary||ary_Arab|ar-MA
Mossi||mos||mos_Latn
Najdi Arabic||ars||ars_Arab
Navajo|nv|nav
Ndau||ndc
Nepali|ne|nep|ne|npi_Deva|npi
Newari||new
Nigerian Pidgin||pcm
North Levantine Arabic||apc||apc_Arab
North Moluccan Malay||max
North Ndebele|nd|nde
Northern Sami|se|sme
Northern Sotho||nso|ns|nso_Latn|Sepedi, Pedi, ns
Norwegian|no|nor|no|nob_Latn|Norwegian Bokmål, nb, nob
Norwegian Nynorsk|nn|nno||nno_Latn
Novial||nov
Nuer||nus||nus_Latn
Occitan|oc|oci|oc|oci_Latn
Odia|or|ori|or|ory_Orya|Oriya, ory
Old English||ang
Old Russian||orv
Oromo|om|orm||gaz_Latn|West Central Oromo, gaz
Ossetian|os|oss
Pangasinan||pag||pag_Latn
Papiamento||pap||pap_Latn
Pashto|ps|pus|ps|pbt_Arab|Pushto, pbt
Persian|fa|fas|fa|pes_Arab|Farsi, pes
Piedmontese||pms
Polish|pl|pol|pl|pol_Latn
Portuguese|pt|por|pt|por_Latn
Punjabi|pa|pan|pa|pan_Guru|Panjabi
Q'eqchi'||kek
Quechua|qu|que||quy_Latn|Ayacucho Quechua, quy
Rohingya||rhg
Romani||rom
Romanian|ro|ron|ro|ron_Latn|Moldovan
Russian|ru|rus|ru|rus_Cyrl
Samoan|sm|smo||smo_Latn
Sango|sg|sag||sag_Latn
Sanskrit|sa|san||san_Deva
Santali||sat||sat_Beng
Saraiki||skr
Sardinian|sc|srd||srd_Latn
Scottish Gaelic|gd|gla|gd|gla_Latn|Gaelic
Serbian|sr|srp|sr|srp_Cyrl
Seychellois Creole||crs
Shan||shn||shn_Mymr
Shona|sn|sna||sna_Latn
Sicilian||scn||scn_Latn
Silesian||szl||szl_Latn
Sindhi|sd|snd|sd|snd_Arab
Sinhala|si|sin|si|sin_Sinh|Sinhalese
Slovak|sk|slk|sk|slk_Latn
Slovenian|sl|slv|sl|slv_Latn
Somali|so|som|so|som_Latn
South Azerbaijani||azb||azb_Arab
South Levantine Arabic||ajp||ajp_Arab
South Ndebele|nr|nbl
Southern Sotho|st|sot||sot_Latn
Spanish|es|spa|es|spa_Latn|Castilian
Sudanese Arabic||apd
Sundanese|su|sun|su|sun_Latn
Susu||sus
Swabian||swg
Swahili|sw|swa|sw|swh_Latn|Kiswahili, swh
Swati|ss|ssw|ss|ssw_Latn
Swedish|sv|swe|sv|swe_Latn
Swiss German||gsw
Sylheti||syl
Ta'izzi-Adeni Arabic||acq||acq_Arab
Tagalog|tl|tgl|tl|tgl_Latn|Filipino, fil
Tahitian|ty|tah
Tajik|tg|tgk||tgk_Cyrl
Talossan||tzl
Tamasheq||taq||taq_Latn
Tamil|ta|tam|ta|tam_Taml
Tatar|tt|tat||tat_Cyrl
Telugu|te|tel||tel_Telu
Tetum||tet
Thai|th|tha|th|tha_Thai
Tibetan|bo|bod||bod_Tibt
Tigrinya|ti|tir||tir_Ethi
Tiv||tiv
Tok Pisin||tpi||tpi_Latn
Tongan|to|ton
Tsonga|ts|tso||tso_Latn
Tswana|tn|tsn|tn|tsn_Latn
Tulu||tcy
Tumbuka||tum||tum_Latn
Tunisian Arabic||aeb||aeb_Arab
Turkish|tr|tur|tr|tur_Latn
Turkmen|tk|tuk||tuk_Latn
Tuvan||tyv
Twi|tw|twi||twi_Latn
Udmurt||udm
Ukrainian|uk|ukr|uk|ukr_Cyrl
Umbundu||umb||umb_Latn
Upper Sorbian||hsb
Urdu|ur|urd|ur|urd_Arab
Uyghur|ug|uig||uig_Arab|Uighur
Uzbek|uz|uzb|uz|uzn_Latn|uzn
Venda|ve|ven
Venetian||vec||vec_Latn
Vietnamese|vi|vie|vi|vie_Latn
Waray||war||war_Latn
Welsh|cy|cym|cy|cym_Latn
Wolof|wo|wol|wo|wol_Latn
Wu Chinese||wuu
Xhosa|xh|xho|xh|xho_Latn
Yakut||sah
Yiddish|yi|yid|yi|ydd_Hebr|Eastern Yiddish, ydd
Yoruba|yo|yor|yo|yor_Latn
Yucatec Maya||yua
Zapotec||zap
Zazaki||zza
Zulu|zu|zul|zu|zul_Latn
"""
