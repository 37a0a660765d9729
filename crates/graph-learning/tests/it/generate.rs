use crate::support::*;
use graph_learning::generate::*;
use graph_learning::{Graph, RandomStream};

fn simple(graph: &Graph) {
    assert!(graph.is_undirected() && !graph.has_self_loops());
    assert_eq!(graph.coalesce().unwrap().0.num_edges(), graph.num_edges());
}

#[test]
fn the_karate_club_is_zacharys() {
    let club = karate_club().unwrap();
    simple(club.graph());
    assert_eq!(
        (club.graph().num_nodes(), club.graph().num_edges()),
        (34, 156)
    );
    assert_eq!(club.labels().iter().sum::<u32>(), 17);
    assert_eq!(club.weights().iter().sum::<f64>(), 2.0 * 231.0);
    let degrees = club.graph().in_degrees();
    assert_eq!((degrees[0], degrees[33]), (16, 17));
}

#[test]
fn random_graphs_have_the_right_number_of_edges() {
    let rng = &mut RandomStream::new(1);
    for (n, p) in [
        (200, 0.1),
        (200, 0.9),
        (30, 0.0),
        (30, 1.0),
        (1, 0.5),
        (0, 0.5),
    ] {
        let graph = erdos_renyi(n, p, rng).unwrap();
        simple(&graph);
        let pairs = (n * n.saturating_sub(1) / 2) as f64;
        let error = (graph.num_edges() as f64 / 2.0 - p * pairs).abs();
        assert!(
            error <= 5.0 * (pairs * p * (1.0 - p)).sqrt() + 1e-9,
            "{n} {p}"
        );
    }
    let p = vec![vec![0.5, 0.02], vec![0.02, 0.3]];
    let (graph, blocks) = stochastic_block_model(&[60, 80], &p, rng).unwrap();
    simple(&graph);
    let crossing = graph
        .edges()
        .filter(|(s, t)| blocks[*s as usize] != blocks[*t as usize])
        .count();
    assert!((crossing as f64 / 2.0 - 96.0).abs() < 50.0, "{crossing}");
    let graph = barabasi_albert(300, 3, rng).unwrap();
    simple(&graph);
    assert_eq!(graph.num_edges(), 2 * (3 + 296 * 3));
    assert!(graph.in_degrees().into_iter().max().unwrap() > 25);
    for beta in [0.0, 0.3, 1.0] {
        let graph = watts_strogatz(50, 4, beta, rng).unwrap();
        simple(&graph);
        assert_eq!(graph.num_edges(), 200);
    }
    let (graph, at) = from_graphon(100, |u, v| u * v, rng).unwrap();
    simple(&graph);
    assert_eq!(at.len(), 100);
    assert_eq!(uniform_edges(10, 77, rng).unwrap().num_edges(), 77);
}

#[test]
fn citation_networks_have_their_proportions() {
    let config = CitationConfig::default();
    let data = citation_network(config, &mut RandomStream::new(1)).unwrap();
    simple(&data.graph);
    data.validate().unwrap();
    let degree = data.graph.num_edges() as f64 / 900.0;
    assert!((degree - config.degree).abs() < 0.05, "{degree}");
    let inside = data
        .graph
        .edges()
        .filter(|(s, t)| data.y[*s as usize] == data.y[*t as usize]);
    let share = inside.count() as f64 / data.graph.num_edges() as f64;
    assert!((share - config.homophily).abs() < 0.04, "{share}");
    assert!(data.graph.in_degrees().into_iter().max().unwrap() > 15);
    let bad = CitationConfig {
        homophily: 1.5,
        ..config
    };
    assert_says(
        citation_network(bad, &mut RandomStream::new(1)).map(|_| ()),
        &["homophily"],
    );
}

#[test]
fn delaunay_edges_are_those_of_empty_circles() {
    let mut rng = RandomStream::new(3);
    let points: Vec<(f64, f64)> = (0..40)
        .map(|_| (rng.next_uniform(), rng.next_uniform()))
        .collect();
    let graph = delaunay(&points).unwrap();
    simple(&graph);
    assert_eq!(graph.connected_components().unwrap().count, 1);
    // A planar graph, and nearest neighbors are always tied.
    assert!(graph.num_edges() / 2 <= 3 * 40 - 6);
    let edges: std::collections::BTreeSet<_> = graph.edges().collect();
    for (i, p) in points.iter().enumerate() {
        let far = |j: usize| (points[j].0 - p.0).powi(2) + (points[j].1 - p.1).powi(2);
        let nearest = (0..40)
            .filter(|j| *j != i)
            .min_by(|a, b| far(*a).total_cmp(&far(*b)))
            .unwrap();
        assert!(edges.contains(&(i as u32, nearest as u32)));
    }
    assert!(delaunay(&points[..2]).is_err());
    assert!(delaunay(&[(0.0, 0.0), (1.0, f64::NAN), (2.0, 0.0)]).is_err());
}

#[test]
fn regular_graphs_have_their_degrees() {
    assert!(ring(7).unwrap().in_degrees().iter().all(|d| *d == 2));
    assert_eq!(ring(2).unwrap().num_edges(), 2);
    assert_eq!(star(5).unwrap().in_degrees(), [4, 1, 1, 1, 1]);
    let grid = grid(3, 4).unwrap();
    assert_eq!(grid.num_edges(), 2 * (3 * 3 + 2 * 4));
    assert_eq!(complete(6).unwrap().num_edges(), 30);
    [
        ring(7).unwrap(),
        star(5).unwrap(),
        grid,
        complete(6).unwrap(),
    ]
    .iter()
    .for_each(simple);
}

#[test]
fn the_same_seed_gives_the_same_graph() {
    let make = |seed| erdos_renyi(100, 0.2, &mut RandomStream::new(seed)).unwrap();
    assert_eq!(make(1), make(1));
    assert_ne!(make(1), make(2));
}

#[test]
fn impossible_graphs_are_refused() {
    let rng = &mut RandomStream::new(1);
    assert_says(erdos_renyi(5, 1.5, rng), &["p", "1.5"]);
    assert_says(barabasi_albert(5, 5, rng), &["m", "1 to 4"]);
    assert_says(watts_strogatz(5, 3, 0.1, rng), &["k", "even"]);
    assert_says(
        stochastic_block_model(&[2, 2], &[vec![1.0]], rng),
        &["2 x 2"],
    );
    let lopsided = [vec![0.1, 0.2], vec![0.3, 0.1]];
    assert_says(
        stochastic_block_model(&[2, 2], &lopsided, rng),
        &["symmetric"],
    );
    assert_says(from_graphon(5, |_, _| 2.0, rng), &["graphon"]);
    assert_says(uniform_edges(0, 1, rng), &["at least 1 node"]);
}
