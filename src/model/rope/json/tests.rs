use serde_json::json;

use super::*;

fn read_plain(json: Value) -> Result<RopeParameters> {
    read(&json, &RopeClass::PLAIN)?.shared()
}

fn parameters(json: Value) -> RopeParameters {
    read_plain(json).unwrap_or_else(|error| panic!("{error:#}"))
}

fn refusal(json: Value) -> String {
    format!("{:#}", read_plain(json).unwrap_err())
}

fn with_share(share: f64) -> Result<RopeParameters> {
    let partial = RopeClass { partial: true, ..RopeClass::PLAIN };
    read(&json!({"partial_rotary_factor": share}), &partial)?.shared()
}

const LLAMA3: &str = r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0}"#;

#[test]
fn both_spellings_give_one_set_of_parameters() {
    let mut scaling: Value = serde_json::from_str(LLAMA3).unwrap();
    let new = parameters(json!({"rope_parameters": scaling}));
    let llama3 = RopeScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original_context: 8192 };
    assert_eq!(new, RopeParameters { scaling: llama3, ..RopeParameters::plain(500_000.0) });
    scaling.as_object_mut().unwrap().remove("rope_theta");
    assert_eq!(parameters(json!({"rope_scaling": scaling, "rope_theta": 500000.0})), new);
    scaling["type"] = scaling["rope_type"].take();
    assert_eq!(parameters(json!({"rope_scaling": scaling, "rope_theta": 500000.0})), new);

    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}});
    assert_eq!(parameters(plain), RopeParameters::plain(500_000.0));
    for nothing in
        [json!({}), json!({"rope_scaling": null}), json!({"rope_scaling": {}, "rope_parameters": {}})]
    {
        assert_eq!(parameters(nothing), RopeParameters::plain(10_000.0));
    }
}

/// As transformers, whose older key replaces the newer one whole: θ inside `rope_parameters` is lost with it.
#[test]
fn rope_scaling_wins_over_rope_parameters() {
    let mut both = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
                          "rope_scaling": {"type": "linear", "factor": 4.0}});
    let linear = RopeScaling::Linear { factor: 4.0 };
    let expected = RopeParameters { scaling: linear, ..RopeParameters::plain(10_000.0) };
    assert_eq!(parameters(both.clone()), expected);
    both["rope_theta"] = json!(100_000);
    assert_eq!(parameters(both.clone()).theta, 100_000.0);
    both["rope_scaling"] = json!({});
    assert_eq!(parameters(both).scaling, RopeScaling::None);
}

#[test]
fn llama3_scaling_keeps_short_wavelengths_and_divides_long_ones() {
    let scaling: Value = serde_json::from_str(LLAMA3).unwrap();
    let rope = parameters(json!({"rope_scaling": scaling}));
    let divisors = rope.divisors(64);
    assert_eq!((divisors[0], divisors[31]), (1.0, 32.0));
    assert!(divisors.is_sorted());
    // Pair 16: wavelength 2π·√500000 = 4442.9 lies between 8192 / 4 and 8192 / 1.
    let kept = (8192.0 / 4442.8829f64 - 1.0) / 3.0;
    assert!((divisors[16] - 1.0 / ((1.0 - kept) / 32.0 + kept)).abs() < 1e-6, "{}", divisors[16]);
    let expected = (500000f64.powf(-0.5) / divisors[16]) as f32;
    assert_eq!(rope.rope(64).inverse_frequencies[16], expected);
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let scaled = parameters(json!({"rope_scaling": {"type": "linear", "factor": 4.0}})).rope(16);
    let plain = RopeParameters::plain(10_000.0).rope(16);
    for (scaled, plain) in scaled.inverse_frequencies.iter().zip(&plain.inverse_frequencies) {
        assert_eq!(scaled * 4.0, *plain);
    }
}

#[test]
fn yarn_has_defaults_for_all_but_its_factor() {
    let yarn = |more: Value| {
        let mut object = json!({"rope_type": "yarn", "factor": 4.0});
        object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let json = json!({"max_position_embeddings": 1024, "rope_scaling": object});
        match parameters(json).scaling {
            RopeScaling::Yarn(yarn) => yarn,
            other => panic!("{other:?}"),
        }
    };
    let magnitude = (0.1 * 4f64.ln() + 1.0) as f32;
    let usual = Yarn {
        factor: 4.0,
        original_context: 1024,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        magnitude,
    };
    assert_eq!(yarn(json!({})), usual);
    assert_eq!(yarn(json!({"beta_fast": null, "beta_slow": 0, "mscale": 2.0, "finetuned": true})), usual);
    let own = yarn(json!({"beta_fast": 8, "beta_slow": 2, "truncate": false, "attention_factor": 1,
                          "original_max_position_embeddings": 256}));
    assert_eq!(
        own,
        Yarn {
            beta_fast: 8.0,
            beta_slow: 2.0,
            truncate: false,
            magnitude: 1.0,
            original_context: 256,
            ..usual.clone()
        }
    );
    // DeepSeek's: (0.0707 · ln 4 + 1) / (0.1 · ln 4 + 1).
    let deepseek = yarn(json!({"mscale": 0.707, "mscale_all_dim": 1.0})).magnitude;
    assert!((deepseek - 0.964_327).abs() < 1e-6, "{deepseek}");
    // No factor: how far the context is stretched.
    let stretched = yarn(json!({"factor": null, "original_max_position_embeddings": 128}));
    assert_eq!((stretched.factor, stretched.magnitude), (8.0, Yarn::usual_magnitude(8.0)));
}

#[test]
fn phi_3_states_the_original_context_beside_the_object() {
    let phi = RopeClass {
        original_context: Some(4096),
        partial: true,
        renamed: &[("yarn", "longrope")],
        ..RopeClass::PLAIN
    };
    for (name, key) in [("su", "type"), ("longrope", "rope_type"), ("yarn", "type")] {
        let mut json = json!({"max_position_embeddings": 131072, "partial_rotary_factor": 0.75,
            "rope_scaling": {key: name, "short_factor": [1.0, 1.5, 2.0], "long_factor": [1, 4, 8]}});
        for original in [4096, 8192] {
            let rope = read(&json, &phi).unwrap().shared().unwrap();
            let magnitude = (1.0 + (131072.0 / original as f64).ln() / (original as f64).ln()).sqrt() as f32;
            assert_eq!(
                rope.scaling,
                RopeScaling::LongRope(LongRope {
                    short: vec![1.0, 1.5, 2.0],
                    long: vec![1.0, 4.0, 8.0],
                    original_context: original,
                    magnitude,
                })
            );
            rope.validate(8).unwrap();
            let turned = rope.rope(8);
            assert_eq!((turned.pairs(), turned.head_dim, turned.magnitude), (3, 8, magnitude));
            assert_eq!(turned.angles(original)[2], (1e4f64.powf(-2.0 / 3.0) / 2.0) as f32);
            assert_eq!(turned.angles(original + 1)[2], (1e4f64.powf(-2.0 / 3.0) / 8.0) as f32);
            json["original_max_position_embeddings"] = json!(8192);
        }
    }
}

#[test]
fn proportional_angles_spread_over_the_whole_head() {
    let json = json!({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25,
                                          "rope_theta": 1e6}});
    let turned = parameters(json).rope(16);
    assert_eq!(turned.inverse_frequencies, [1.0, 1e6f64.powf(-0.125) as f32, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn a_part_of_a_head_turns_where_the_class_says_so() {
    for (share, head_dim, rotary) in [(0.75, 128, 96), (0.4, 80, 32), (0.5, 64, 32), (1.0, 6, 6)] {
        let rope = with_share(share).unwrap();
        assert_eq!(rope.rotary_dim(head_dim), rotary);
        assert_eq!(rope.rope(head_dim).pairs(), rotary / 2);
    }
    for head_dim in 1..300 {
        for rotary in 1..=head_dim {
            let share = RopeParameters::share_of(rotary, head_dim);
            assert_eq!((head_dim as f64 * share) as usize, rotary, "{rotary} of {head_dim}");
        }
    }
    assert!(refusal(json!({"partial_rotary_factor": 0.5})).contains("`partial_rotary_factor` is 0.5"));
    assert!(with_share(0.1).unwrap().validate(16).unwrap_err().to_string().contains("rotates 1 of 16"));
    assert!(with_share(1.5).unwrap().validate(16).unwrap_err().to_string().contains("a share of a head"));
}

#[test]
fn layer_types_have_parameters_of_their_own() {
    let json = json!({"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "no_rope": null, "rope_theta": 3.0}});
    let table = read(&json, &RopeClass::PLAIN).unwrap();
    assert_eq!(table.of("sliding_attention").unwrap(), Some(&RopeParameters::plain(1e4)));
    let full = table.of("full_attention").unwrap().unwrap();
    assert_eq!((full.theta, &full.scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!(table.of("no_rope").unwrap(), None);
    assert!(table.of("chunked").unwrap_err().to_string().contains("`chunked`"));
    assert!(table.shared().unwrap_err().to_string().contains("full_attention"));
    let one = read(&json!({"rope_theta": 7.0}), &RopeClass::PLAIN).unwrap();
    assert_eq!(one.of("anything").unwrap(), Some(&RopeParameters::plain(7.0)));
}

#[test]
fn every_key_is_honoured_or_refused_by_name() {
    let scaling = |object: Value| json!({"rope_scaling": object});
    for (json, words) in [
        (scaling(json!({"type": "yarn"})), "`factor` is missing"),
        (scaling(json!({"type": "linear"})), "`factor` is missing"),
        (scaling(json!({"type": "llama3", "factor": 4.0})), "`low_freq_factor` is missing"),
        (scaling(json!({"type": "longrope", "short_factor": [1.0]})), "`long_factor` is no list"),
        (scaling(json!({"type": "ntk", "factor": 2.0})), "type `ntk` is not known"),
        (scaling(json!({"rope_type": 3})), "rope_type"),
        (scaling(json!({"type": "linear", "factor": "4"})), "`factor` is `\"4\"`"),
        (scaling(json!({"type": "dynamic", "factor": 1.0, "alpha": 1000.0})), "`alpha` is `1000.0`"),
        (scaling(json!({"type": "linear", "factor": 4.0, "beta_fast": 32})), "`beta_fast` is `32`"),
        (
            scaling(json!({"type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5})),
            "extrapolation_factor",
        ),
        (scaling(json!({"type": "yarn", "factor": 4.0, "truncate": 1})), "`truncate` is `1`"),
        (scaling(json!({"type": "default", "factor": 4.0})), "`factor` is `4.0`"),
        (
            scaling(json!({"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1})),
            "llama_4_scaling_beta",
        ),
        (json!({"rope_scaling": "linear"}), "`rope_scaling` is `\"linear\"`"),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "ntk"}}}),
            "`rope_parameters.full_attention`",
        ),
        (json!({"rope_parameters": {"full_attention": {}, "factor": 2.0}}), "`rope_parameters.factor`"),
        (json!({"rope_theta": "1e4"}), "rope_theta"),
    ] {
        let message = refusal(json);
        assert!(message.contains(words), "{message}: {words}");
    }
    for silent in [
        json!({"type": "mrope", "mrope_section": [2, 1, 1], "mrope_interleaved": true}),
        json!({"type": "default", "factor": 1.0, "beta_fast": null, "original_max_position_embeddings": 8}),
    ] {
        assert_eq!(parameters(scaling(silent)), RopeParameters::plain(10_000.0));
    }
}

#[test]
fn numbers_that_describe_no_rotation_are_refused() {
    let invalid = |object: Value| {
        let rope = parameters(json!({"rope_scaling": object}));
        rope.validate(8).unwrap_err().to_string()
    };
    for (object, words) in [
        (json!({"type": "linear", "factor": 0.0}), "`factor` is 0"),
        (json!({"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}), "`beta_slow` 2 is above"),
        (json!({"type": "yarn", "factor": 2.0, "attention_factor": -1.0}), "`attention_factor` is -1"),
        (
            json!({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}),
            "original_max_position",
        ),
        (json!({"type": "yarn", "factor": 2.0, "rope_theta": 1.0}), "`rope_theta` is 1"),
        (
            json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
            "1 RoPE divisors, wanted 4",
        ),
        (
            json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
            "not below",
        ),
    ] {
        let message = invalid(object);
        assert!(message.contains(words), "{message}: {words}");
    }
}

#[test]
fn what_is_written_is_read_again() {
    let partial = RopeClass { partial: true, ..RopeClass::PLAIN };
    for object in [
        json!({}),
        json!({"partial_rotary_factor": 0.4, "rope_theta": 1234567.9}),
        json!({"rope_type": "linear", "factor": 1.1}),
        json!({"rope_type": "dynamic", "factor": 2.5}),
        json!({"rope_type": "proportional", "factor": 2.5, "partial_rotary_factor": 0.25}),
        serde_json::from_str(LLAMA3).unwrap(),
        json!({"rope_type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": false}),
        json!({"rope_type": "yarn", "factor": 3.3, "beta_fast": 7.7, "beta_slow": 1.3}),
        json!({"rope_type": "longrope", "short_factor": [1.1, 1.3], "long_factor": [7.7, 9.9], "factor": 7.0,
               "original_max_position_embeddings": 100}),
    ] {
        let json = json!({"max_position_embeddings": 4096, "rope_parameters": object});
        let rope = read(&json, &partial).unwrap().shared().unwrap();
        let written =
            json!({"max_position_embeddings": 4096, "rope_parameters": write(&rope, &partial).unwrap()});
        assert_eq!(read(&written, &partial).unwrap().shared().unwrap(), rope, "{written}");
    }
}
