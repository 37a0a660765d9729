use candle_core::Device;
use thalweg_tensor_core::{device, Error};

#[test]
fn the_processor_is_always_there() {
    let cpu = device::parse("cpu").unwrap();
    assert!(cpu.is_cpu());
    assert_eq!(device::name(&cpu), "cpu");
    assert!(device::parse(&device::name(&Device::Cpu)).unwrap().is_cpu());
}

#[test]
fn other_names_are_refused_with_the_list_of_names() {
    let names = [
        "",
        "gpu",
        "CPU",
        "cpu:0",
        "cpu:",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1:2",
        " cuda",
        "metal:",
        "metal:1.0",
    ];
    for name in names {
        let error = device::parse(name).unwrap_err();
        assert!(
            matches!(&error, Error::UnknownDevice(n) if n == name),
            "{name}: {error}"
        );
        assert!(error.to_string().contains("`cuda:N`"), "{error}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_without_the_feature_names_the_feature() {
    for name in ["cuda", "cuda:1"] {
        let error = device::parse(name).unwrap_err();
        assert!(
            matches!(&error, Error::FeatureMissing { device, feature: "cuda" } if device == name)
        );
        assert!(
            error.to_string().contains("cargo feature `cuda`"),
            "{error}"
        );
    }
}

#[cfg(not(feature = "metal"))]
#[test]
fn metal_without_the_feature_names_the_feature() {
    for name in ["metal", "metal:0"] {
        let error = device::parse(name).unwrap_err();
        assert!(
            matches!(&error, Error::FeatureMissing { device, feature: "metal" } if device == name)
        );
    }
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_devices_have_the_name_they_were_opened_by() {
    assert_eq!(device::name(&device::parse("cuda").unwrap()), "cuda:0");
}
