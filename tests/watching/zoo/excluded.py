"""The model types that are not in the catalogue, with the reason, from trying."""


def _because(reasons: dict[str, str]) -> dict[str, str]:
    """A reason for each name, from the names for each reason."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}


NO_ATTENTION: dict[str, str] = _because(
    {
        "Fourier transform in place of attention": """
            fnet
        """,
        "convolutions and pooling, or a bare model without its attention": """
            bit convnext convnextv2 dac dinov3_convnext efficientnet encodec focalnet hgnet_v2
            mobilenet_v1 mobilenet_v2 muse_spark_audio poolformer pp_lcnet pp_lcnet_v3
            pp_lcnet_v4 pp_ocrv5_mobile_det pp_ocrv5_server_det pp_ocrv5_server_rec
            pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec regnet
            resnet rt_detr_resnet superpoint textnet timm_backbone univnet upernet uvdoc
            uvdoc_backbone vibevoice_acoustic_tokenizer_decoder
        """,
        "recurrent (state space or RWKV)": """
            falcon_mamba mamba mamba2 rwkv xlstm
        """,
    }
)

NOT_BUILT: dict[str, str] = _because(
    {
        "default config or inputs not understood": """
            chmv2 clvp depth_anything depth_pro gemma4_unified_assistant granite_speech5_ctc
            granite_speech5_encoder lw_detr prompt_depth_anything qwen3_asr_encoder
            speech-encoder-decoder step3p7 tipsv2_dpt vitmatte vitpose vitpose_backbone
            voxtral_realtime voxtral_realtime_text zamba zoedepth
        """,
        "has no forward of its own; its parts do the work": """
            bark glm_image_vqmodel qwen2_5_omni
        """,
        "its default config lacks a field that the model reads": """
            moonshine_streaming musicgen musicgen_melody pix2struct qwen2_5_omni_thinker
            qwen3_omni_moe qwen3_omni_moe_thinker t5gemma2_encoder
        """,
        "its default config or forward needs values that are None by default": """
            chameleon deepseek_ocr2 diffusion_gemma granite4_vision idefics pp_doclayout_v2
            sam3_lite_text_text_model siglip2 vibevoice_acoustic_tokenizer_encoder
        """,
        "its forward needs a video session": """
            edgetam_video sam2_video sam3_tracker_video sam3_video
        """,
        "its forward needs arguments that we do not make yet": """
            gemma3n_audio jev mimi_decoder muse_glimmer_assistant pe_audio pi0
            pocket_tts_audio_tokenizer_decoder
        """,
        "needs detectron2": """
            layoutlmv2
        """,
        "needs natten": """
            dinat
        """,
        "needs scipy": """
            eomt eomt_dinov3 inkling_mm_model videomt
        """,
        "needs timm": """
            edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision omdet-turbo
            pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perception_lm
            timm_wrapper
        """,
        "needs torchaudio": """
            higgs_audio_v2_tokenizer
        """,
        "not finite, or not the same twice, with random weights": """
            lw_detr_vit rf_detr_dinov2
        """,
        "sizes that do not agree after shrinking": """
            align clap deformable_detr efficientloftr esmc fastspeech2_conformer_with_hifigan
            fun_asr_nano_encoder gemma4_assistant gemma4_audio grounding-dino hiera idefics2
            inkling2_vision instructblipvideo lightglue minicpm_ocr_vision minicpmv4_7_vision
            mm-grounding-dino nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp
            nemotron3_diarization neucodec oneformer pe_audio_encoder pp_ocrv5_mobile_rec pvt_v2
            radio rf_detr sam2 sam2_hiera_det_model sam2_vision_model sam3 sam3_lite_text
            sam3_tracker sam_hq shieldgemma2 speecht5 superglue swin2sr t5gemma2
            time_series_transformer tvp ultravbert unlimited_ocr vision-text-dual-encoder
            wav2vec2-bert xclip xcodec xcodec2 zamba2
        """,
        "not done in 15 s on two slow cores": """
            blt emu3 glm5_next glm5_next_text nemo_speechlm vibevoice
            vibevoice_acoustic_tokenizer vibevoice_asr
        """,
    }
)
