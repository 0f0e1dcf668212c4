//! Finding the rails that an endpoint uses.

use std::{net::IpAddr, sync::Arc};

use super::{EndpointError, config::Config};
use crate::fabric::{
    Device, FabricKind,
    shm::{ShmConfig, ShmDevice},
    tcp::{TcpConfig, TcpDevice},
    verbs::VerbsDevice,
};

/// Most rails: what a control message can name.
const MAX_RAILS: usize = 16;

/// Opens the rails that `config` asks for, best fabric first. What could not be used is logged with its reason.
pub(super) fn open(
    config: &Config,
    bind: IpAddr,
    given: Vec<Arc<dyn Device>>,
) -> Result<Vec<Arc<dyn Device>>, EndpointError> {
    let mut rails = given;
    let mut reasons = Vec::new();
    for kind in &config.fabrics {
        match kind {
            FabricKind::Verbs => {
                let (devices, skipped) =
                    VerbsDevice::open_all(&config.verbs, config.devices.as_deref());
                rails.extend(devices.into_iter().map(|device| device as Arc<dyn Device>));
                reasons.extend(skipped.iter().map(ToString::to_string));
            }
            FabricKind::Shm => match ShmDevice::open(ShmConfig::default()) {
                Ok(device) => rails.push(device),
                Err(error) => reasons.push(error.to_string()),
            },
            FabricKind::Tcp => {
                let options = TcpConfig {
                    bind,
                    ..TcpConfig::default()
                };
                match TcpDevice::open(options) {
                    Ok(device) => rails.push(device),
                    Err(error) => reasons.push(error.to_string()),
                }
            }
            kind => reasons.push(format!("{kind}: not to be had by name")),
        }
    }
    for device in rails.drain(MAX_RAILS.min(rails.len())..) {
        let info = device.info();
        reasons.push(format!(
            "{}/{}: more than {MAX_RAILS} rails",
            info.name, info.port
        ));
    }
    for reason in &reasons {
        tracing::info!(reason, "rail not used");
    }
    if rails.is_empty() {
        Err(EndpointError::NoRail(reasons))
    } else {
        Ok(rails)
    }
}
