//! The scenarios, by the crate that holds the method.

#[cfg(feature = "convex")]
mod convex;
#[cfg(feature = "flows")]
pub(crate) mod flows;
#[cfg(feature = "flows")]
pub mod generation;
#[cfg(feature = "graph-learning")]
mod graph_learning;
#[cfg(feature = "guidance")]
mod guidance;
#[cfg(feature = "nn")]
mod nn;
#[cfg(feature = "optim")]
mod optim;
#[cfg(feature = "sequence-design")]
mod sequence_design;
pub mod training;

use crate::scenario::Scenario;

/// All scenarios of this build: one line each.
pub fn all() -> Vec<Box<dyn Scenario>> {
    vec![
        #[cfg(feature = "optim")]
        Box::new(optim::lion::Lion),
        #[cfg(feature = "optim")]
        Box::new(optim::spam::Spam),
        #[cfg(feature = "optim")]
        Box::new(optim::perp_grad::PerpGrad),
        #[cfg(feature = "optim")]
        Box::new(optim::large_batch::LargeBatch),
        #[cfg(feature = "optim")]
        Box::new(optim::sso::Sso),
        #[cfg(feature = "optim")]
        Box::new(optim::bo_rep::BoRep),
        #[cfg(feature = "optim")]
        Box::new(optim::cbo::Cbo),
        #[cfg(feature = "optim")]
        Box::new(optim::gradsign::GradSign),
        #[cfg(feature = "optim")]
        Box::new(optim::opposing_signals::OpposingSignals),
        #[cfg(feature = "nn")]
        Box::new(nn::power_norm::PowerNorm),
        #[cfg(feature = "graph-learning")]
        Box::new(graph_learning::convolutions::Convolutions),
        #[cfg(feature = "graph-learning")]
        Box::new(graph_learning::forward_gnn::ForwardGnn),
        #[cfg(feature = "graph-learning")]
        Box::new(graph_learning::w2pgnn::W2pGnn),
        #[cfg(feature = "graph-learning")]
        Box::new(graph_learning::graphfm::GraphFm),
        #[cfg(feature = "graph-learning")]
        Box::new(graph_learning::cgs::Cgs),
        #[cfg(feature = "graph-learning")]
        Box::new(graph_learning::pot::PotScenario),
        #[cfg(feature = "flows")]
        Box::new(flows::rectified_flow::RectifiedFlow),
        #[cfg(feature = "flows")]
        Box::new(flows::disback::DisBackScenario),
        #[cfg(feature = "guidance")]
        Box::new(guidance::samplers::Samplers),
        #[cfg(feature = "guidance")]
        Box::new(guidance::apg::Apg),
        #[cfg(feature = "guidance")]
        Box::new(guidance::adaptive::AdaptiveGuidanceScenario),
        #[cfg(feature = "guidance")]
        Box::new(guidance::gfcg::GfcgScenario),
        #[cfg(feature = "guidance")]
        Box::new(guidance::flowchef::FlowChefScenario),
        #[cfg(feature = "guidance")]
        Box::new(guidance::reno::RenoScenario),
        #[cfg(feature = "guidance")]
        Box::new(guidance::adjoint_dpm::AdjointDpm),
        #[cfg(feature = "guidance")]
        Box::new(guidance::ppap::Ppap),
        #[cfg(feature = "convex")]
        Box::new(convex::sparse_ot::SparseOt),
        #[cfg(feature = "convex")]
        Box::new(convex::bcd::Bcd),
        #[cfg(feature = "convex")]
        Box::new(convex::convex_relu::ConvexRelu),
        #[cfg(feature = "convex")]
        Box::new(convex::attention_svm::AttentionSvm),
        #[cfg(feature = "sequence-design")]
        Box::new(sequence_design::op_gfn::OpGfn),
        #[cfg(feature = "sequence-design")]
        Box::new(sequence_design::drakes::Drakes),
        #[cfg(feature = "sequence-design")]
        Box::new(sequence_design::bib::Bib),
        #[cfg(feature = "sequence-design")]
        Box::new(sequence_design::svdd::SvddScenario),
    ]
}
