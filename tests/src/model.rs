//! Adapters that put the product's pure cores under the model checker (`stateright`): every order of events, to bounds small
//! enough for seconds. The cores are the very ones that run in production.

pub mod tokens;
