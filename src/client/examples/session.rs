//! A session that travels: write in one region, read it in two others, without waiting by hand.
//!
//! Regions replicate in the background, so a read in another region may come too early. A session
//! token says what its holder has seen; a read that carries it waits until the region that serves
//! it has that, too. Start three regions with `tombolo demo`, then:
//!
//! ```text
//! cargo run -p tombolo-client --example session -- \
//!     --us 127.0.0.1:7101 --eu 127.0.0.1:7201 --ap 127.0.0.1:7301
//! ```

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use clap::Parser;
use std::time::Instant;
use tombolo_client::{Client, ClientConfig, Consistency, Session};

/// One node of each region; the client finds the others.
#[derive(Parser)]
struct Args {
    #[arg(long)]
    us: String,
    #[arg(long)]
    eu: String,
    #[arg(long)]
    ap: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();

    // A client talks to one region. It learns who leads which shard and sends each call there.
    let us = connect(args.us).await?;
    let eu = connect(args.eu).await?;
    let ap = connect(args.ap).await?;

    // 1. Ana writes in the US. Her session takes in the token of the reply.
    let ana = us.session();
    let written = us.namespace("default").put("cart:ana", "3 lemons").session(&ana).await?;
    println!("us: put cart:ana, dot {}, token of {} bytes", written.dot, ana.token().len());

    // 2. A moment later her phone talks to the EU. Without her session the read shows whatever
    //    has arrived by now, which may be nothing:
    let hasty = eu.namespace("default").get("cart:ana").consistency(Consistency::Local).await?;
    println!("eu: without the session: {}", show(hasty.value()));

    //    In her session it waits for what she has seen, and not longer:
    let begin = Instant::now();
    let got = eu.namespace("default").get("cart:ana").session(&ana).await?;
    println!("eu: in her session: {} after {:?}", show(got.value()), begin.elapsed());
    assert!(got.value().is_some(), "a session reads its own writes in every region");

    // 3. The token is plain bytes: put it in a cookie, a message, or a job, and someone else
    //    continues from there, in yet another region. Here a worker in AP reads and answers.
    let token = ana.token();
    let worker = Session::from_token(token);
    let keys = ap.namespace("default").with_session(&worker);
    let got = keys.get("cart:ana").await?;
    println!("ap: from the token: {}", show(got.value()));

    // 4. It replaces exactly what it has read. Had someone else changed the cart meanwhile, in
    //    any region, that change would not be overwritten unseen.
    let written = keys.put("cart:ana", "3 lemons, packed").context(&got.context).await?;
    println!("ap: put with the context it read, conflict: {}", written.conflict);

    // 5. And back: Ana learns from the worker's token what to wait for.
    ana.merge(&worker.token())?;
    let got = us.namespace("default").get("cart:ana").session(&ana).await?;
    println!("us: {}", show(got.value()));
    Ok(())
}

async fn connect(endpoint: String) -> tombolo_client::Result<Client> {
    Client::connect(ClientConfig { endpoints: vec![endpoint], ..Default::default() }).await
}

fn show(value: Option<&bytes::Bytes>) -> String {
    value.map_or("nothing yet".into(), |value| String::from_utf8_lossy(value).into_owned())
}
