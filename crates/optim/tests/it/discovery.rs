use crate::support::*;
use candle_core::{DType, Device, Var};
use candle_nn::Optimizer;
use optim::discovery::*;
use optim::transform::{Chain, ClipByGlobalNorm};
use optim::{Error, Lion, LionConfig, NonFinite, RandomStream, Result, Stateful};
use proptest::prelude::*;

fn signature() -> Signature {
    Signature::optimizer()
}

fn parse(body: &str) -> Program {
    let text = format!("def f(w, g, m, v, lr):\n{body}\n  return (update, m, v)\n");
    text.parse().unwrap()
}

/// Weights after some steps on gradients that a seed draws.
fn weights_after(program: &Program, steps: u64, seed: u64) -> Vec<f64> {
    let compiled = CompiledProgram::new(program, &signature()).unwrap();
    let mut rng = RandomStream::new(seed);
    let mut w: Vec<f64> = (0..9).map(|_| rng.next_normal()).collect();
    let mut run = compiled.run::<f64>(&[4, 5]);
    for t in 0..steps {
        let g: Vec<f64> = (0..9).map(|_| rng.next_normal()).collect();
        run.update(&mut w, &g, 1.0 / (t + 1) as f64).unwrap();
    }
    w
}

#[test]
fn text_reads_back() {
    for program in [Program::adamw(), Program::lion(), Program::raw_lion()] {
        let program = program.unwrap();
        assert_eq!(program.to_string().parse::<Program>().unwrap(), program);
        assert!(typecheck(&program, &signature()).is_ok());
        let json = serde_json::to_string(&program).unwrap();
        assert_eq!(serde_json::from_str::<Program>(&json).unwrap(), program);
    }
    let nested = parse("  update = (g - -2e-3 * (m + w)) / sqrt(v) # a comment\n\n  m = g");
    let flat = parse("  v0 = m + w\n  v1 = -0.002 * v0\n  v2 = g - v1\n  v3 = sqrt(v)\n  update = v2 / v3\n  m = g");
    assert_eq!(nested.to_string(), flat.to_string());
    assert_eq!(
        parse("  update = -g").to_string(),
        parse("  update = negative(g)").to_string()
    );
}

#[test]
fn bad_text_names_the_line() {
    let cases = [
        ("", "no text"),
        ("def f(w):\n  x = w", "no `return`"),
        ("def f(w, w):\n  return w", "twice"),
        ("def f(w):\n  x = y\n  return x", "line 2: `y`"),
        ("def f(w):\n  if w:\n  return w", "`if`"),
        ("def f(w):\n  def g(x):\n  return w", "inner"),
        ("def f(w):\n  x = foo(w)\n  return x", "`foo`"),
        ("def f(w):\n  x = sin(w, w)\n  return x", "takes 1"),
        ("def f(w):\n  x = w +\n  return x", "end of the line"),
        ("def f(w):\n  x = 1e999\n  return w", "finite"),
        ("def f(w):\n  return z", "`z`"),
        ("def f(w):\n  return w\n  x = w", "after `return`"),
        ("def f(w)\n  return w", "`:`"),
    ];
    for (text, part) in cases {
        let error = text.parse::<Program>().unwrap_err();
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
}

#[test]
fn ill_typed_programs_are_refused() {
    let cases = [
        ("  update = interpolate(g, m, v)", "must be a scalar"),
        ("  update = clip_by_global_norm(g, w)", "must be a scalar"),
        ("  update = dot(g, m)", "not a tree"),
        ("  update = w * 0.1", "depends on none"),
        ("  x = arcsin(2)\n  update = g * x", "of constants is NaN"),
        ("  m = lr\n  update = g", "not a tree"),
    ];
    for (body, part) in cases {
        let error = typecheck(&parse(body), &signature()).unwrap_err();
        assert!(matches!(error, Error::ProgramType { .. }));
        assert!(error.to_string().contains(part), "{body}: {error}");
    }
    let small = Signature {
        max_len: 2,
        ops: OpSet::all().without(&[Op::Sin]),
        ..signature()
    };
    let error = typecheck(&Program::adamw().unwrap(), &small).unwrap_err();
    assert!(error.to_string().contains("at most 2"));
    let error = typecheck(&parse("  update = sin(g)"), &small).unwrap_err();
    assert!(error.to_string().contains("`sin` is not allowed"));
    let other: Program = "def f(g, w):\n  return (g, w, w)".parse().unwrap();
    assert!(typecheck(&other, &signature()).is_err());
}

#[test]
fn hashes_know_what_matters() {
    let base = Program::adamw().unwrap();
    let same = [
        // Other names, other order, dead code.
        "  q = square(g)\n  v = interpolate(q, v, 0.999)\n  m = interpolate(g, m, 0.9)\n  s = sqrt(v)\n  lr = lr * 0.001\n  d = w * 0.01\n  dead = cosh(d)\n  update = m / s\n  update = update + d\n  update = update * lr",
    ];
    let all = [HashMode::Exact, HashMode::Search, HashMode::Official];
    for body in same {
        for mode in all {
            assert_eq!(
                hash(&parse(body), &signature(), mode),
                hash(&base, &signature(), mode)
            );
        }
    }
    let changed: Program = base.to_string().replace("0.999", "0.998").parse().unwrap();
    for mode in all {
        assert_ne!(
            hash(&changed, &signature(), mode),
            hash(&base, &signature(), mode)
        );
    }
    let near: Program = base
        .to_string()
        .replace("0.9)", "0.90001)")
        .parse()
        .unwrap();
    assert_eq!(
        hash(&near, &signature(), HashMode::Search),
        hash(&base, &signature(), HashMode::Search)
    );
    // The order of a sum, and a product with 1.
    let (a, b) = (parse("  update = g + m"), parse("  update = m + g"));
    assert_eq!(
        hash(&a, &signature(), HashMode::Exact),
        hash(&b, &signature(), HashMode::Exact)
    );
    assert_ne!(
        hash(&a, &signature(), HashMode::Official),
        hash(&b, &signature(), HashMode::Official)
    );
    let (a, b) = (
        parse("  update = g * lr"),
        parse("  x = g * 1.0\n  update = x * lr"),
    );
    assert_ne!(
        hash(&a, &signature(), HashMode::Exact),
        hash(&b, &signature(), HashMode::Exact)
    );
    let print = |p: &Program| fingerprint(p, &signature()).unwrap();
    assert_eq!(print(&a), print(&b));
    assert_ne!(print(&a), print(&base));
    // Small updates differ as much as large ones, and so do the trees that are carried.
    let (tiny, tinier) = (parse("  update = g * 1e-8"), parse("  update = g * 2e-8"));
    assert_ne!(print(&tiny), print(&tinier));
    let carries = |rate: &str| parse(&format!("  m = m * {rate}\n  m = m + g\n  update = m * lr"));
    assert_ne!(print(&carries("0.9")), print(&carries("0.90002")));
    // A tree that no later step reads does not count.
    let unread = parse("  update = g * lr\n  v = sin(w)");
    assert_eq!(print(&parse("  update = g * lr")), print(&unread));
    assert!(fingerprint(
        &"def f(w, g, m, v, lr):\n  return (g, m, v)"
            .parse()
            .unwrap(),
        &signature()
    )
    .is_ok());
}

/// The statement that made a dead output a tree again goes away; what is left may be a scalar.
#[test]
fn simplified_programs_stay_well_typed() {
    for body in [
        "  m = dot(g, g)\n  update = g * m\n  m = cosh(update)",
        "  v = dot(g, w)\n  m = dot(g, g)\n  update = g * m\n  update = update * v\n  m = sin(w)\n  v = sin(g)",
    ] {
        let program = parse(body);
        typecheck(&program, &signature()).unwrap();
        let simple = simplify(&program, &signature());
        typecheck(&simple, &signature()).unwrap();
        assert!(simple.body.len() < program.body.len());
        assert_eq!(weights_after(&program, 5, 1), weights_after(&simple, 5, 1));
    }
}

#[test]
fn the_raw_winner_is_simplified() {
    let raw = Program::raw_lion().unwrap();
    let simple = simplify(&raw, &signature());
    assert!(!simple.to_string().contains("cosh"));
    assert_eq!(simple.body.len(), raw.body.len() - 1);
    // What it does to the weights stays, over carried steps.
    assert_eq!(weights_after(&raw, 10, 1), weights_after(&simple, 10, 1));
    // Constants fold, copies of constants go away, names that nothing uses too.
    let folded = simplify(
        &parse("  a = 2.0 * 3.0\n  b = a + 1.0\n  unused = sin(g)\n  update = g * b"),
        &signature(),
    );
    assert_eq!(folded.body.len(), 1);
    assert!(folded.to_string().contains("update = g * 7.0"), "{folded}");
    // A carried tree whose output is overwritten before anybody reads it.
    let carried = simplify(
        &parse("  m = g + w\n  update = m * lr\n  m = sin(v)\n  v = exp(v)"),
        &signature(),
    );
    assert_eq!(carried.body.len(), 2, "{carried}");
}

#[test]
fn the_program_is_lion() {
    let program = Program::lion().unwrap();
    for dtype in [DType::F64, DType::F32] {
        let (a, b) = (named_params(3, dtype), named_params(3, dtype));
        let vars = |p: &[(String, Var)]| p.iter().map(|(_, v)| v.clone()).collect::<Vec<_>>();
        let config = LionConfig {
            weight_decay: 0.1,
            ..LionConfig::default()
        };
        let mut lion = Lion::new(vars(&a), config).unwrap();
        let mut own = ProgramOptimizer::new(vars(&b), ProgramConfig::new(program.clone())).unwrap();
        run(&mut lion, &a, 7, 0..12);
        run(&mut own, &b, 7, 0..12);
        let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-6 };
        for ((_, a), (_, b)) in a.iter().zip(&b) {
            assert_close(&values(b), &values(a), tolerance);
        }
    }
}

#[test]
fn optimizers_resume_and_refuse() {
    let with_norms = parse("  n = norm(g)\n  c = clip_by_global_norm(g, 1.0)\n  s = cosine_sim(c, w)\n  m = interpolate(c, m, 0.9)\n  a = m / n\n  update = a * 0.01\n  update = update + s");
    for program in [Program::adamw().unwrap(), with_norms] {
        let (a, b) = (named_params(1, DType::F32), named_params(1, DType::F32));
        let make = |p: &[(String, Var)]| {
            ProgramOptimizer::named(p.to_vec(), ProgramConfig::new(program.clone())).unwrap()
        };
        let mut first = make(&a);
        run(&mut first, &a, 2, 0..3);
        let mut second = make(&b);
        for ((_, from), (_, to)) in a.iter().zip(&b) {
            to.set(&from.as_detached_tensor().copy().unwrap()).unwrap();
        }
        second.load_state(&first.state().unwrap()).unwrap();
        run(&mut first, &a, 2, 3..6);
        run(&mut second, &b, 2, 3..6);
        assert_eq!(all_bits(&a), all_bits(&b));
        assert!(second.load_state(&Default::default()).is_err());
        let before = all_bits(&a);
        let bad = (a[1].1.zeros_like().unwrap() / 0.0).unwrap();
        let held = a[1].1.elem_count() as u64;
        match first.step(&store(&a[1].1, &bad)) {
            // Nothing mixes entries: every one is held.
            Ok(()) => assert_eq!(first.counts().held, held),
            Err(error) => assert!(error.to_string().contains(&a[1].0), "{error}"),
        }
        assert_eq!(all_bits(&a), before);
        // Only the parameter with a gradient moves.
        first
            .step(&store(&a[1].1, &a[1].1.ones_like().unwrap()))
            .unwrap();
        let after = all_bits(&a);
        assert_eq!(after[0], before[0]);
        assert_ne!(after[1], before[1], "{program}");
    }
    let half = Var::zeros(3, DType::BF16, &Device::Cpu).unwrap();
    let config = ProgramConfig::new(Program::lion().unwrap());
    assert!(ProgramOptimizer::new(vec![half], config).is_err());
}

/// What goes where when outputs are other trees that go in, entries are held, and a transform scales.
#[test]
fn outputs_may_be_inputs_and_entries_are_held() {
    let swap = parse("  update = m - v\n  v = m\n  m = g");
    let w = Var::new(&[1.0f64, 2.0, 3.0], &Device::Cpu).unwrap();
    let params = vec![("w".to_string(), w.clone())];
    let mut own = ProgramOptimizer::named(params, ProgramConfig::new(swap.clone())).unwrap();
    own.step(&store(&w, &tensor(&[0.5, f64::NAN, -1.0])))
        .unwrap();
    own.step(&store(&w, &tensor(&[4.0, 4.0, 4.0]))).unwrap();
    // The second step subtracts the first one's gradients; the held entry had none.
    assert_eq!(values(&w), [0.5, 2.0, 4.0]);
    let state = own.state().unwrap();
    assert_eq!(values(&state["m.w"]), [4.0; 3]);
    assert_eq!(values(&state["v.w"]), [0.5, 0.0, -1.0]);
    assert_eq!((own.counts().held, own.counts().taken), (1, 2));
    assert_eq!(own.state_bytes(), 2 * 3 * 8);
    let moved = parse("  update = v\n  v = w\n  m = m");
    let w = Var::new(&[1.0f64, 2.0], &Device::Cpu).unwrap();
    let params = vec![("w".to_string(), w.clone())];
    let mut own = ProgramOptimizer::named(params, ProgramConfig::new(moved)).unwrap();
    for _ in 0..2 {
        own.step(&store(&w, &tensor(&[1.0, 1.0]))).unwrap();
    }
    assert_eq!(values(&w), [0.0, 0.0]);
    let skip = ProgramConfig {
        nonfinite: NonFinite::SkipStep,
        ..ProgramConfig::new(swap)
    };
    let params = vec![("w".to_string(), w.clone())];
    let mut own = ProgramOptimizer::named(params, skip)
        .unwrap()
        .with_transforms(Chain::new().then(ClipByGlobalNorm::new(1.0).unwrap()));
    own.step(&store(&w, &tensor(&[f64::INFINITY, 1.0])))
        .unwrap();
    assert_eq!((own.counts().skipped, own.counts().taken), (1, 0));
    own.step(&store(&w, &tensor(&[3.0, 4.0]))).unwrap();
    assert_close(&values(&own.state().unwrap()["m.w"]), &[0.6, 0.8], 1e-12);
}

/// Large tensors take several tasks; reductions and tiles must not notice.
#[test]
fn tiles_and_threads_have_no_influence() {
    let program = parse("  s = global_norm(g)\n  n = norm(w)\n  d = dot(g, w)\n  x = g / s\n  y = w / n\n  update = x + y\n  update = update * d\n  m = max(x, m)\n  v = power(s, 2.0)\n  v = g * v");
    let compiled = CompiledProgram::new(&program, &signature()).unwrap();
    assert_eq!(compiled.passes(), 2);
    let sizes = [40_000, 3, 1000];
    let n: usize = sizes.iter().sum();
    let mut rng = RandomStream::new(4);
    let mut draw = || (0..n).map(|_| rng.next_normal()).collect::<Vec<f64>>();
    let (w, g) = (draw(), draw());
    let mut moved = w.clone();
    let mut run = compiled.run::<f64>(&sizes);
    run.update(&mut moved, &g, 1.0).unwrap();
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (s, d) = (norm(&g), g.iter().zip(&w).map(|(a, b)| a * b).sum::<f64>());
    let mut expected = Vec::new();
    let mut from = 0;
    for size in sizes {
        let own = norm(&w[from..from + size]);
        for i in from..from + size {
            let update = (g[i] / (s + 1e-8) + w[i] / (own + 1e-8)) * d;
            expected.push(w[i] - update);
        }
        from += size;
    }
    assert_close(&moved, &expected, 1e-9);
    let zeros = vec![0.0; n];
    let outputs = compiled
        .evaluate::<f64>(&[&w, &g, &zeros, &zeros], &[1.0], &sizes)
        .unwrap();
    let again: Vec<f64> = w.iter().zip(&outputs[0]).map(|(w, u)| w - u).collect();
    assert_eq!(again, moved);
    assert_eq!(run.state()[0][0], outputs[1][..sizes[0]]);
    assert!(run.update(&mut moved[1..].to_vec(), &g, 1.0).is_err());
    assert!(compiled.evaluate::<f64>(&[&w], &[1.0], &sizes).is_err());
}

proptest! {
    #![proptest_config(cases(60))]

    /// Children are well typed, read back, and are the same after simplification.
    #[test]
    fn children_are_programs(seed in 0u64..100_000) {
        let mutator = Mutator::default();
        let mut rng = RandomStream::new(seed);
        let mut program = Program::adamw().unwrap();
        for _ in 0..12 {
            let Some(child) = mutator.mutate(&program, &mut rng).unwrap().0 else { continue };
            prop_assert!(typecheck(&child, &signature()).is_ok());
            prop_assert_eq!(&child.to_string().parse::<Program>().unwrap(), &child);
            program = child;
        }
        let simple = simplify(&program, &signature());
        prop_assert!(simple.body.len() <= program.body.len());
        let bits = |p: &Program| weights_after(p, 4, 5).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&simple), bits(&program), "{}\n{}", program, simple);
        let (a, b) = (hash(&program, &signature(), HashMode::Exact), hash(&simple, &signature(), HashMode::Exact));
        prop_assert!(a == b || simple.body.len() < program.body.len());
        let tuned = mutator.tune(&program, &mut rng).unwrap();
        if let Some(tuned) = tuned {
            prop_assert_eq!(tuned.body.len(), program.body.len());
        }
    }
}

/// Descent on a bowl whose axes differ by a factor of 100, from a start that the seed draws.
struct Bowl;

impl ProxyTask for Bowl {
    fn fitness(&self, program: &CompiledProgram, seed: u64, abort: &AbortRule) -> Result<Fitness> {
        let mut rng = RandomStream::new(seed);
        let mut w: Vec<f32> = (0..6).map(|_| rng.next_normal() as f32).collect();
        let scale = |i: usize| 10f32.powf(i as f32 * 0.4);
        let mut run = program.run::<f32>(&[2, 4]);
        for step in 0..40 {
            let g: Vec<f32> = w.iter().enumerate().map(|(i, w)| scale(i) * w).collect();
            run.update(&mut w, &g, 1.0 - f64::from(step) / 40.0)?;
            if abort.stops(step as usize + 1, 0.0, &w) {
                return Ok(Fitness::aborted(step as usize + 1));
            }
        }
        let loss: f32 = w.iter().enumerate().map(|(i, w)| scale(i) * w * w).sum();
        Ok(Fitness::of(f64::from(loss)))
    }
}

#[test]
fn searches_find_something_and_repeat() {
    let warm = Program::adamw().unwrap();
    let rng = RandomStream::new(11);
    let search = Evolution {
        population: 12,
        budget: 120,
        restart_after: 40,
        ..Evolution::default()
    };
    let first = search.run(&Bowl, &warm, &rng).unwrap();
    let mut second = search.run(&Bowl, &warm, &rng).unwrap();
    second.wall = first.wall;
    assert_eq!(first, second);
    assert_eq!((first.evaluated, first.population.len()), (120, 12));
    assert!(first.finished && first.best_fitness < 0.5 * first.history[0].best);
    assert!(first.duplicates > 0 && first.type_invalid > 0);
    assert_eq!(first.generated, first.duplicates + first.evaluated - 1);
    let compiled = CompiledProgram::new(&first.best, &signature()).unwrap();
    let again = Bowl.fitness(&compiled, 0, &AbortRule::default()).unwrap();
    assert_eq!(again.value, first.best_fitness);
    let random = RandomSearch {
        budget: 60,
        ..RandomSearch::default()
    };
    let random = random
        .run_with(&Bowl, &warm, &rng, SearchOptions::default())
        .unwrap();
    let tuning = ConstantTuning {
        budget: 60,
        ..ConstantTuning::default()
    };
    let tuned = tuning
        .run_with(&Bowl, &warm, &rng, SearchOptions::default())
        .unwrap();
    assert_eq!((random.evaluated, tuned.evaluated), (60, 60));
    assert!(tuned.best_fitness < tuned.history[0].best);
    assert_eq!(tuned.best.body.len(), warm.body.len());
    for bad in [
        Evolution {
            population: 0,
            ..search.clone()
        },
        Evolution {
            budget: 0,
            ..search.clone()
        },
        Evolution {
            mutator: Mutator {
                insert: -1.0,
                ..Mutator::default()
            },
            ..search.clone()
        },
    ] {
        assert!(bad.run(&Bowl, &warm, &rng).is_err());
    }
}

#[test]
fn a_stopped_search_continues_with_the_same_bits() {
    let warm = Program::adamw().unwrap();
    let rng = RandomStream::new(12);
    let search = Evolution {
        population: 10,
        budget: 80,
        restart_after: 25,
        ..Evolution::default()
    };
    let whole = search.run(&Bowl, &warm, &rng).unwrap();
    let path =
        std::env::temp_dir().join(format!("thalweg-search-{}.safetensors", std::process::id()));
    let options = |limit: usize| SearchOptions {
        checkpoint: Some(path.clone()),
        progress: Some(Box::new(move |p: &Progress| p.evaluated < limit)),
        ..SearchOptions::default()
    };
    for limit in [20, 41, 60] {
        let part = search.run_with(&Bowl, &warm, &rng, options(limit)).unwrap();
        assert!(!part.finished && part.evaluated >= limit);
    }
    let mut rest = search
        .run_with(&Bowl, &warm, &rng, options(usize::MAX))
        .unwrap();
    rest.wall = whole.wall;
    assert_eq!(rest, whole);
    // Another search does not take the file.
    let other = search.run_with(&Bowl, &warm, &RandomStream::new(13), options(50));
    assert!(other.unwrap_err().to_string().contains("other settings"));
    std::fs::remove_file(&path).unwrap();
}

/// The bowl by which a search is watched: another start.
struct OtherBowl;

impl ProxyTask for OtherBowl {
    fn fitness(&self, program: &CompiledProgram, seed: u64, abort: &AbortRule) -> Result<Fitness> {
        Bowl.fitness(program, seed + 1, abort)
    }
}

#[test]
fn a_larger_task_watches_the_search() {
    let search = Evolution {
        population: 8,
        budget: 80,
        restart_after: 15,
        ..Evolution::default()
    };
    let path = std::env::temp_dir().join(format!("watched-{}.safetensors", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let (warm, rng) = (Program::adamw().unwrap(), RandomStream::new(14));
    let options = |limit: usize, file: bool| SearchOptions {
        meta: Some(&OtherBowl),
        checkpoint: file.then(|| path.clone()),
        progress: Some(Box::new(move |p: &Progress| p.evaluated < limit)),
        ..SearchOptions::default()
    };
    let whole = search
        .run_with(&Bowl, &warm, &rng, options(usize::MAX, false))
        .unwrap();
    let best = whole.best_meta.clone().unwrap();
    let lowest = whole
        .history
        .iter()
        .filter_map(|h| h.meta)
        .fold(f64::INFINITY, f64::min);
    assert_eq!(best.meta, lowest);
    assert!(whole.restarts > 0 && whole.history[0].meta.is_some());
    let compiled = CompiledProgram::new(&best.individual.program, &signature()).unwrap();
    let again = OtherBowl
        .fitness(&compiled, 0, &AbortRule::default())
        .unwrap();
    assert_eq!(again.value, best.meta);
    search
        .run_with(&Bowl, &warm, &rng, options(30, true))
        .unwrap();
    let mut rest = search
        .run_with(&Bowl, &warm, &rng, options(usize::MAX, true))
        .unwrap();
    rest.wall = whole.wall;
    assert_eq!(rest, whole);
    std::fs::remove_file(&path).unwrap();
}

/// A task whose fitness is the number of statements.
struct Short;

impl ProxyTask for Short {
    fn fitness(&self, program: &CompiledProgram, _: u64, _: &AbortRule) -> Result<Fitness> {
        Ok(Fitness::of(program.program().body.len() as f64))
    }
}

#[test]
fn the_funnel_narrows() {
    let programs = [
        Program::adamw().unwrap(),
        Program::lion().unwrap(),
        parse("  update = g * lr"),
    ];
    let stage = |task: Box<dyn ProxyTask>, keep, baseline| FunnelStage {
        task,
        keep,
        baseline,
        seed: 0,
    };
    let funnel = Funnel {
        stages: vec![
            stage(Box::new(Short), 3, Some(8.0)),
            stage(Box::new(Bowl), 1, None),
        ],
    };
    let selected = funnel.select(&programs, &signature()).unwrap();
    // Two are shorter than 8 statements; the best of them on the bowl is left.
    assert_eq!(selected.len(), 1);
    assert_eq!(selected[0].fitness.len(), 2);
    assert!(selected[0].fitness[0] < 8.0);
    assert!(funnel.select(&[], &signature()).is_err());
    let mut rng = RandomStream::new(1);
    let (program, fitness) = Funnel::tuned_adamw(&Bowl, 8, 0, &mut rng).unwrap();
    let compiled = CompiledProgram::new(&program, &signature()).unwrap();
    assert_eq!(
        Bowl.fitness(&compiled, 0, &AbortRule::default())
            .unwrap()
            .value,
        fitness
    );
    assert!(Funnel::tuned_adamw(&Bowl, 0, 0, &mut rng).is_err());
    let rule = AbortRule::for_classes(10);
    assert!(rule.stops(10, 1e3, &[0.0]) && rule.stops(20, 0.0, &[f64::NAN]));
    assert!(rule.stops(10, f64::NAN, &[0.0]) && !rule.stops(9, 1e3, &[0.0]));
}
