use crate::support::*;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use sequence_design::sequences::*;
use sequence_design::{Error, RandomStream};
use std::io::Write;

fn random_codes(seed: u64, length: usize, below: usize) -> Vec<u8> {
    let mut rng = RandomStream::new(seed);
    (0..length)
        .map(|_| rng.below(below).unwrap() as u8)
        .collect()
}

proptest! {
    #![proptest_config(cases(32))]

    /// Texts are codes and back, masks included; the other strand's other strand is the strand.
    #[test]
    fn texts_and_strands_come_back(seed in 0u64..1000, length in 1usize..40) {
        for alphabet in [Alphabet::dna(), Alphabet::rna(), Alphabet::protein()] {
            let codes = random_codes(seed, length, alphabet.len() + 1);
            let text = alphabet.decode(&codes).unwrap();
            prop_assert_eq!(&alphabet.encode(&text, "x", Ambiguous::Mask).unwrap(), &codes);
            let lower = text.to_ascii_lowercase();
            prop_assert_eq!(&alphabet.encode(&lower, "x", Ambiguous::Mask).unwrap(), &codes);
            match alphabet.reverse_complement(&codes) {
                Ok(other) => prop_assert_eq!(alphabet.reverse_complement(&other).unwrap(), codes),
                Err(error) => prop_assert!(error.to_string().contains("pair")),
            }
        }
    }

    /// Records are the same after a file in either format.
    #[test]
    fn files_come_back(seed in 0u64..1000, count in 1usize..5) {
        let dna = Alphabet::dna();
        let mut rng = RandomStream::new(seed);
        let mut records = vec![];
        for k in 0..count {
            let codes = random_codes(rng.bits(), 1 + rng.below(90).unwrap(), 5);
            let quality = codes.iter().map(|_| rng.below(94).unwrap() as u8).collect();
            let description = if k % 2 == 0 { String::new() } else { format!("number {k}") };
            records.push(Record { name: format!("r{k}"), description, codes, quality: Some(quality) });
        }
        let mut file = vec![];
        write_fastq(&mut file, &dna, &records).unwrap();
        prop_assert_eq!(&read_fastx(&file[..], &dna, Ambiguous::Mask).unwrap(), &records);
        let mut file = vec![];
        write_fasta(&mut file, &dna, &records).unwrap();
        records.iter_mut().for_each(|r| r.quality = None);
        prop_assert_eq!(&read_fastx(&file[..], &dna, Ambiguous::Mask).unwrap(), &records);
    }
}

#[test]
fn ambiguity_is_spread_masked_or_refused() {
    let dna = Alphabet::dna();
    let soft = dna
        .soft_one_hot(&["AR", "nt"], DType::F64, &Device::Cpu)
        .unwrap();
    assert_eq!(soft.dims(), [2, 2, 4]);
    let expected = [
        1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 1.0,
    ];
    assert_eq!(values(&soft), expected);
    let hard = dna
        .one_hot(&[vec![0, 4], vec![2, 3]], DType::F32, &Device::Cpu)
        .unwrap();
    let expected = [
        1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0,
    ];
    assert_eq!(values(&hard), expected);
    // All eleven codes, and what the protein codes stand for.
    let sizes = |alphabet: &Alphabet, text: &str| -> Vec<usize> {
        let soft = alphabet
            .soft_one_hot(&[text], DType::F64, &Device::Cpu)
            .unwrap();
        let rows = soft.to_vec3::<f64>().unwrap().remove(0);
        rows.iter()
            .map(|r| r.iter().filter(|p| **p > 0.0).count())
            .collect()
    };
    assert_eq!(
        sizes(&dna, "RYSWKMBDHVN"),
        [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    );
    assert_eq!(
        sizes(&Alphabet::rna(), "RYSWKMBDHVNU"),
        [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 1]
    );
    assert_eq!(sizes(&Alphabet::protein(), "BZJXw"), [2, 2, 2, 20, 1]);
    for (alphabet, text, at) in [
        (&dna, "ACGU", 4),
        (&Alphabet::rna(), "AT", 2),
        (&Alphabet::protein(), "MK*", 3),
        (&dna, "AC-GT", 3),
    ] {
        let error = alphabet
            .encode(text, "strange", Ambiguous::Mask)
            .unwrap_err();
        let Error::Sequence {
            record, position, ..
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((record.as_str(), position), ("strange", at));
        assert!(alphabet
            .soft_one_hot(&[text], DType::F32, &Device::Cpu)
            .is_err());
    }
}

#[test]
fn custom_alphabets_are_checked() {
    let bits = Alphabet::custom("01").unwrap();
    assert_eq!(
        (bits.len(), bits.mask(), bits.letters()),
        (2, 2, &b"01"[..])
    );
    assert_eq!(
        bits.encode("0110", "x", Ambiguous::Refuse).unwrap(),
        [0, 1, 1, 0]
    );
    // No letter stands for all, so that a mask cannot be written.
    assert!(bits.decode(&[0, 2]).is_err() && bits.decode(&[3]).is_err());
    let bits = bits.with_ambiguity('?', "01").unwrap();
    assert_eq!(bits.decode(&[0, 2]).unwrap(), "0?");
    for letters in ["", "A", "AA", "A>", "A B", "Aé"] {
        assert!(Alphabet::custom(letters).is_err(), "{letters}");
    }
    let long: String = ('!'..='~')
        .filter(|c| !">@".contains(*c))
        .take(65)
        .collect();
    assert!(Alphabet::custom(&long).is_err() && Alphabet::custom(&long[..64]).is_ok());
    let ab = || Alphabet::custom("ab").unwrap();
    assert!(ab().with_ambiguity('a', "ab").is_err() && ab().with_ambiguity('n', "").is_err());
    assert!(ab().with_ambiguity('n', "ac").is_err() && ab().with_complement("b").is_err());
    assert!(ab().with_complement("bb").is_err() && ab().with_complement("ba").is_ok());
    assert!(ab().encode("B", "x", Ambiguous::Mask).is_err());
}

#[test]
fn fasta_as_it_comes() {
    let dna = Alphabet::dna();
    let read = |text: &str| read_fastx(text.as_bytes(), &dna, Ambiguous::Refuse);
    let records = read(">one  two words \r\nACGT\r\nac\r\n>next\r\nG").unwrap();
    assert_eq!(records[0].codes, [0, 1, 2, 3, 0, 1]);
    assert_eq!(records[0].description, "two words");
    assert_eq!(
        (records[1].name.as_str(), &records[1].codes[..]),
        ("next", &[2][..])
    );
    for (text, words) in [
        ("", "FASTA or FASTQ"),
        ("ACGT\n", "FASTA or FASTQ"),
        (">good\nACGT\n>bad\nAC GT\n", "bad, position 3"),
        (
            ">bad\nAC\nGX\n",
            "bad, position 4: `X` is no letter of ACGT",
        ),
        ("@r\nACGT\n+\nIII\n", "FASTA or FASTQ"),
        ("@r\nAC\n+\nI\u{7f}\n", "r, position 2"),
    ] {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // A header alone is a record without letters, or no record.
    assert!(read(">alone\n>next\nA\n").is_err());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.fa.gz");
    let file = std::fs::File::create(&path).unwrap();
    let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    gz.write_all(b">zipped\nGATTACA\n").unwrap();
    gz.finish().unwrap();
    let records = read_fastx_file(&path, &dna, Ambiguous::Refuse).unwrap();
    assert_eq!(dna.decode(&records[0].codes).unwrap(), "GATTACA");
    let error = read_fastx_file(dir.path().join("absent"), &dna, Ambiguous::Refuse).unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
}

#[test]
fn qualities_mask_letters() {
    let dna = Alphabet::dna();
    let records = read_fastx(&b"@read\nACGT\n+\nI!5I\n"[..], &dna, Ambiguous::Refuse).unwrap();
    assert_eq!(records[0].quality.as_deref(), Some(&[40, 0, 20, 40][..]));
    assert_eq!(records[0].masked_below(20, &dna), [0, 4, 2, 3]);
    let plain = Record {
        quality: None,
        ..records[0].clone()
    };
    assert_eq!(plain.masked_below(20, &dna), plain.codes);
    let mut out = vec![];
    assert!(write_fastq(&mut out, &dna, std::slice::from_ref(&plain)).is_err());
    let broken = Record {
        name: "two\nlines".into(),
        ..plain.clone()
    };
    assert!(write_fasta(&mut out, &dna, &[broken]).is_err());
    let beyond = Record {
        codes: vec![5],
        ..plain
    };
    assert!(write_fasta(&mut out, &dna, &[beyond]).is_err() && out.is_empty());
}

#[test]
fn tables_come_back_and_are_checked() {
    let dna = Alphabet::dna();
    let columns = Columns {
        name: Some("id".into()),
        sequence: "seq".into(),
        scores: vec!["hepg2".into(), "k562".into()],
        delimiter: b'\t',
    };
    let text = "id\tseq\thepg2\tk562\nx, y\tACGT\t0.5\t-1\nz\tGGN\t1e-3\t2\n";
    let read = |text: &str| read_table(text.as_bytes(), &dna, Ambiguous::Mask, &columns);
    let table = read(text).unwrap();
    assert_eq!(table.codes(), [vec![0, 1, 2, 3], vec![2, 2, 4]]);
    assert_eq!(table.column(1).unwrap(), [-1.0, 2.0]);
    assert!(table.column(2).is_err());
    let mut out = vec![];
    write_table(&mut out, &dna, &table, &columns).unwrap();
    assert_eq!(read(std::str::from_utf8(&out).unwrap()).unwrap(), table);
    for (text, words) in [
        ("id\tseq\thepg2\tk562\n", "no rows"),
        ("id\tseq\thepg2\n", "no column `k562` among id, seq, hepg2"),
        (
            "id\tseq\thepg2\tk562\nx\tA\t1\tNaN\n",
            "row 1: k562 = `NaN`",
        ),
        ("id\tseq\thepg2\tk562\nx\tA\t1\n", "a table"),
        ("id\tseq\thepg2\tk562\nx\tAXA\t1\t2\n", "x, position 2"),
        ("id\tseq\thepg2\tk562\nx\t\t1\t2\n", "x, position 1"),
    ] {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let mut uneven = table.clone();
    uneven.scores[0].pop();
    assert!(write_table(&mut vec![], &dna, &uneven, &columns).is_err());
    uneven.scores.pop();
    assert!(write_table(&mut vec![], &dna, &uneven, &columns).is_err());
}

#[test]
fn tokens_have_one_length_or_are_filled_up() {
    let dna = Alphabet::dna();
    let cpu = &Device::Cpu;
    let tokens = dna.tokens(&[vec![0, 4], vec![2, 3]], cpu).unwrap();
    assert_eq!(tokens.to_vec2::<u32>().unwrap(), [[0, 4], [2, 3]]);
    assert_eq!(dna.codes(&tokens).unwrap(), [[0, 4], [2, 3]]);
    let (tokens, counts) = dna
        .padded_tokens(&[vec![1, 2, 3], vec![2]], 2, cpu)
        .unwrap();
    assert_eq!(tokens.to_vec2::<u32>().unwrap(), [[1, 2], [2, 0]]);
    assert_eq!(values(&counts), [1.0, 1.0, 1.0, 0.0]);
    for beyond in [5u32, 300] {
        assert!(dna
            .codes(&Tensor::new(&[[0, beyond]], cpu).unwrap())
            .is_err());
    }
    assert!(dna.tokens(&[], cpu).is_err() && dna.tokens(&[vec![]], cpu).is_err());
    assert!(
        dna.tokens(&[vec![0], vec![0, 1]], cpu).is_err() && dna.tokens(&[vec![5]], cpu).is_err()
    );
    assert!(
        dna.padded_tokens(&[], 2, cpu).is_err() && dna.padded_tokens(&[vec![0]], 0, cpu).is_err()
    );
}
