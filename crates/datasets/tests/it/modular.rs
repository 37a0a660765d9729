use candle_core::{DType, Device};
use thalweg_datasets::generate::{ModularOp, ModularTable};
use thalweg_datasets::Error;

#[test]
fn results_obey_the_laws_of_arithmetic() {
    for p in [2, 3, 5, 13] {
        for op in [
            ModularOp::Add,
            ModularOp::Subtract,
            ModularOp::Multiply,
            ModularOp::Divide,
        ] {
            let table = ModularTable::new(op, p).unwrap();
            let rows = table.rows();
            let expected = if op == ModularOp::Divide {
                p * (p - 1)
            } else {
                p * p
            };
            assert_eq!(rows.len(), expected);
            let p = p as u32;
            for [a, b, c] in rows {
                let holds = match op {
                    ModularOp::Add => (a + b) % p == *c,
                    ModularOp::Subtract => (c + b) % p == *a,
                    ModularOp::Multiply => (a * b) % p == *c,
                    ModularOp::Divide => (c * b) % p == *a && *b != 0,
                };
                assert!(holds && *c < p, "{op:?} mod {p}: {a} {b} -> {c}");
            }
        }
    }
}

#[test]
fn all_three_forms_say_the_same() {
    let table = ModularTable::new(ModularOp::Subtract, 113).unwrap();
    let device = Device::Cpu;
    let one_hot = table.one_hot(DType::F32, &device).unwrap();
    assert_eq!(one_hot.inputs.dims(), &[113 * 113, 226]);
    assert_eq!(one_hot.classes, 113);
    let rows = one_hot.inputs.to_vec2::<f32>().unwrap();
    let pairs = table.pairs(&device).unwrap();
    let tokens = table.tokens(&device).unwrap();
    assert_eq!(table.vocabulary(), 115);
    let (pairs_x, tokens_x) = (
        pairs.inputs.to_vec2::<u32>().unwrap(),
        tokens.inputs.to_vec2::<u32>().unwrap(),
    );
    for i in [0, 1, 113, 5000, 113 * 113 - 1] {
        let [a, b, c] = table.rows()[i];
        assert_eq!(i as u32, a * 113 + b);
        assert_eq!(pairs_x[i], [a, b]);
        assert_eq!(tokens_x[i], [a, 113, b, 114]);
        assert_eq!(rows[i].iter().sum::<f32>(), 2.0);
        assert_eq!(rows[i][a as usize] + rows[i][113 + b as usize], 2.0);
        assert_eq!(one_hot.label_vec().unwrap()[i], c);
    }
    assert_eq!(pairs.label_vec().unwrap(), tokens.label_vec().unwrap());
}

#[test]
fn bad_moduli_are_refused() {
    for (op, p) in [
        (ModularOp::Add, 0),
        (ModularOp::Add, 1),
        (ModularOp::Multiply, 5000),
        (ModularOp::Divide, 12),
    ] {
        assert!(matches!(
            ModularTable::new(op, p),
            Err(Error::InvalidArgument {
                name: "modulus",
                ..
            })
        ));
    }
    let large = ModularTable::new(ModularOp::Add, 813).unwrap();
    let error = large.one_hot(DType::U8, &Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("at most 812"), "{error}");
}
