"""The model types of the catalogue, by family, which decides on which side texts are padded."""

_NAMES = {
    "decoder": """
        afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom
        codegen cohere cohere2 cohere2_moe cohere_compass_text cosmos3_edge_text cpmant csm ctrl
        cwm dbrx decision_transformer deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama
        doge dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1
        flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm
        glm4 glm4_moe glm4_moe_lite glm4v_moe_text glm4v_text glm_image_text glm_moe_dsa
        glm_ocr_text gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
        gradium_phonon_tts granite granite_docling_text granite_swa granitemoe granitemoe_swa
        granitemoehybrid granitemoeshared helium higgs_audio_v2 hrm_text hunyuan_v1_dense
        hunyuan_v1_moe hunyuan_vl_text hy_v3 hy_v4 hyperclovax imagegpt inkling2_text inkling_text
        internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 kyutai_speech_to_text laguna
        lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax
        minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mistral_large4_text mixtral
        modernbert-decoder molmo2_text moshi mpt muse_glimmer_text muse_spark_text nanochat
        nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3
        phimoe pocket_tts qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text
        qwen3_5_text qwen3_moe qwen3_next qwen3_vl_moe_text qwen3_vl_text qwen4_exp_text
        recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma xglm
        youtu zaya
    """,
    "encoder": """
        albert bert bert-generation big_bird blip_2_qformer bros camembert canine clip_text_model
        colmodernvbert convbert data2vec-text deberta deberta-v2 distilbert dpr electra
        embedding_gemma2 embedding_gemma2_text ernie esm eurobert fastspeech2_conformer flaubert
        funnel gte ibert jina_embeddings_v3 layoutlm layoutlmv3 lilt longformer luke markuplm
        megatron-bert mobilebert modernbert modernvbert mpnet mra neomme nomic_bert nystromformer
        openai_privacy_filter patchtsmixer patchtst perceiver reformer rembert roberta
        roberta-prelayernorm roc_bert roformer splinter squeezebert tapas timesfm timesfm2_5
        tipsv2_text_model ultrabert vits xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso
    """,
    "encoder-decoder": """
        audioflamingo3 autoformer bart bigbird_pegasus blenderbot blenderbot-small dia
        encoder-decoder fsmt informer led longt5 m2m_100 marian mbart mt5 musicflamingo mvp
        nllb-moe pegasus pegasus_x plbart pop2piano prophetnet seamless_m4t seamless_m4t_v2
        switch_transformers t5 t5gemma umt5
    """,
    "vision": """
        aimv2_vision_model beit chinese_clip_vision_model clip_vision_model cohere_compass_vision
        conditional_detr cosmos3_edge_vision cvt d_fine dab-detr data2vec-vision deimv2 deit detr
        dinov2 dinov2_with_registers dinov3_vit donut-swin dpt exaone4_5_vision gemma4_vision
        glm4v_moe_vision glm4v_vision glm5_next_vision glm_image_vision glm_ocr_vision glpn
        granite_docling_vision hunyuan_vl_vision idefics3_vision ijepa internvl_vision
        kimi_k25_vision levit lfm3_vl_vision mask2former maskformer maskformer-swin mgp-str mlcd
        mlcd_vision_model mobilevit mobilevitv2 muse_glimmer_vision muse_spark_vision pixio
        pixtral pp_doclayout_v3 pp_doclayout_v4 pvt qianfan_ocr_vision qwen2_5_vl_vision
        qwen3_5_moe_vision qwen3_5_vision qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision
        rt_detr rt_detr_v2 sam sam3_vision_model sam3_vit_model sam_hq_vision_model
        sam_vision_model sapiens2 segformer seggpt siglip2_vision_model siglip_vision_model slanet
        slanext smolvlm_vision swiftformer swin swinv2 table-transformer timesformer
        tipsv2_vision_model video_llama_3_vision videomae videoprism_vision_model vit vit_mae
        vit_msn vitdet vivit vjepa2 yolos
    """,
    "audio": """
        audio-spectrogram-transformer audioflamingo3_encoder canary cohere_asr data2vec-audio
        glmasr_encoder hubert lasr_ctc lasr_encoder mimi mimi_encoder moonshine
        moss_transcribe_diarize_audio nemotron3_5_asr nemotron3_5_transcribe_asr_audio
        nemotron3_diarization_audio nemotron_asr_streaming nemotron_asr_streaming_encoder
        parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt pocket_tts_audio_tokenizer
        pocket_tts_audio_tokenizer_encoder qwen2_audio_encoder sew sew-d speech_to_text unispeech
        unispeech-sat voxtral_encoder voxtral_realtime_encoder wav2vec2 wav2vec2-conformer wavlm
        whisper
    """,
    "multimodal": """
        aimv2 altclip aria aya_vision blip blip-2 bridgetower chinese_clip clip clipseg
        cohere2_vision cohere_compass colpali colqwen2 cosmos3_edge cosmos3_omni deepseek_vl
        deepseek_vl_hybrid dots3_note ernie4_5_vl_moe evolla exaone4_5 flava florence2
        fun_asr_nano fuyu gemma3 gemma4 gemma4_unified git glm46v glm4v glm4v_moe glm_image
        glm_ocr glmasr glmga got_ocr2 granite_docling granite_speech granite_speech_plus groupvit
        hunyuan_vl hyperclovax_vision_v2 idefics3 inkling2 instructblip internvl janus kimi_k25
        kosmos-2 kosmos-2.5 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video
        llava_onevision lxmert metaclip_2 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl
        mistral3 mistral4 mistral_large4 mllama molmo2 moss_transcribe_diarize muse_glimmer
        muse_spark nemotron_h_omni ovis2 owlv2 owlvit paddleocr_vl paligemma phi4_multimodal
        pp_chart2table pp_formulanet qianfan_ocr qwen2_5_vl qwen2_audio qwen2_vl qwen3_5
        qwen3_5_moe qwen3_asr qwen3_vl qwen3_vl_moe qwen4_exp siglip smolvlm tipsv2 udop
        video_llama_3 video_llava videoprism vilt vipllava vision-encoder-decoder visual_bert
        voxtral
    """,
}
FAMILIES: dict[str, str] = {name: family for family, names in _NAMES.items() for name in names.split()}
