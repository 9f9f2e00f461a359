//! A real etcd that speaks TLS and wants certificates: its rules as the arbiter are those of one in clear, a pair fails over by it, and
//! whoever comes without a certificate, with one of another authority's, or to a server that is not the one it should be, is turned away
//! with what to do about it, and a swap of theirs has certainly not happened. The same with a user and a password.
#![forbid(unsafe_code)]

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hypervisor::arbiter::Arbiter;
use hypervisor::demo::report::Report;
use hypervisor::protocol::{Identity, Record};

use crate::harness::arbiter_rules;
use crate::harness::certificates::Authority;
use crate::harness::etcd::{Etcd, Tls, arbiter_at};
use crate::harness::program::doppel;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "etcd-tls",
    line: "etcd over mutual TLS: the arbiter's rules hold and a pair fails over; who has no certificate, or a wrong one, is told what to do",
    short: std::time::Duration::from_secs(15),
    full: std::time::Duration::from_secs(60),
    show,
};

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let directory = tempfile::Builder::new()
        .prefix("doppel-tls-")
        .tempdir()
        .context("make a directory")?;
    let files = directory.path().join("certificates");
    let tls = Tls::new(&files)?;
    let start = |name: &str, tls: &Tls| {
        let at = Ipv4Addr::LOCALHOST.into();
        Etcd::start_with(&directory.path().join(name), at, Some(tls.clone()))
    };
    let etcd = start("sealed", &tls)?;

    let rounds = run.form.pick(10, 200);
    let sealed =
        |machine: &str| -> Result<Box<dyn Arbiter>> { Ok(Box::new(etcd.arbiter(machine)?)) };
    let swaps = arbiter_rules::check(&sealed, 4, rounds).context("over TLS")?;
    run.say(format!("the rules hold over TLS; {swaps} swaps raced"));
    figures.add("raced_swaps", swaps);

    let turned_away = strangers(&etcd, &files, &tls).context("strangers")?;
    run.say(format!(
        "{turned_away} kinds of strangers turned away, each with what to do"
    ));
    figures.add("strangers_turned_away", turned_away);

    guarded(&etcd, &tls).context("files that others can get at")?;
    users(&etcd, &files, &tls).context("users")?;
    run.say("a user and a password where etcd wants them");
    drop(etcd);

    let etcd = start("demo", &tls)?;
    let output = Command::new(doppel()?)
        .args(["demo", "--json", "--arbiter", &etcd.place()])
        .args(["--seed", &run.seed.to_string()])
        .output()
        .context("start doppel demo")?;
    let (text, said) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(output.status.success(), "{}: {said} {text}", output.status);
    let report: Report = serde_json::from_str(&text).context("read the demo's JSON")?;
    ensure!(
        report.lost_acknowledged_writes == 0 && report.broken_connections == 0 && report.epoch == 2,
        "{text}"
    );
    let took = report.failover_ms.context("no failover was measured")?;
    run.say(format!("a pair failed over by it in {took:.1} ms"));
    figures.add("demo_failover_ms", took);
    Ok(figures)
}

/// A swap at this place fails, certainly without effect, and says this.
fn turned_away(place: &str, words: &[&str]) -> Result<()> {
    let record = Record::cold_start(None, Identity::from_bytes([9; 16]), None);
    let error = match arbiter_at(place, "stranger") {
        Ok(arbiter) => arbiter.swap(None, &record).err().map(|error| {
            let landed = error.may_have_landed();
            (error.to_string(), landed)
        }),
        Err(error) => Some((format!("{error:#}"), false)),
    };
    let (error, landed) = error.with_context(|| format!("{place} was served"))?;
    for word in words {
        ensure!(error.contains(word), "{place}: no {word:?} in {error:?}");
    }
    ensure!(!landed, "{place}: it may have landed, says {error:?}");
    Ok(())
}

/// Those whom it does not serve: how many kinds.
fn strangers(etcd: &Etcd, files: &Path, tls: &Tls) -> Result<u64> {
    let (address, ca) = (etcd.address(), tls.ca.display());
    turned_away(
        &format!("etcds://{address}?ca={ca}"),
        &["wants this client's certificate", "cert=FILE"],
    )?;
    let other = Authority::new(files, "other-ca")?;
    let stranger = other.client("stranger")?;
    let (cert, key) = (stranger.cert.display(), stranger.key.display());
    turned_away(
        &format!("etcds://{address}?ca={ca}&cert={cert}&key={key}"),
        &[
            "does not take this client's certificate",
            "--trusted-ca-file",
        ],
    )?;
    let cert = tls.client.cert.display();
    let key = tls.client.key.display();
    let other = other.certificate().display();
    turned_away(
        &format!("etcds://{address}?ca={other}&cert={cert}&key={key}"),
        &["not issued by an authority in", "ca=FILE"],
    )?;
    turned_away(
        &format!(
            "etcds://{address}?ca={ca}&cert={cert}&key={}",
            stranger.key.display()
        ),
        &["key=", "is not what it should be"],
    )?;
    turned_away(
        &format!("etcds://{address}?ca={key}"),
        &["no certificate in PEM"],
    )?;
    let plain = arbiter_at(&format!("etcd://{address}"), "stranger")?;
    let error = plain.read().err().context("it was served in clear")?;
    ensure!(error.to_string().contains("etcds://"), "{error}");
    let record = etcd.arbiter("stranger")?.read()?;
    ensure!(record.is_none(), "a stranger wrote {record:?}");
    // The right server by a name that is not in its certificate.
    turned_away(
        &format!(
            "etcds://localhost:{}?ca={ca}&cert={}&key={key}",
            address.port(),
            tls.client.cert.display()
        ),
        &["not made out to localhost", "subjectAltName"],
    )?;
    // One that does not speak TLS at all.
    let plain = Etcd::start(&files.join("plain"))?;
    turned_away(
        &format!("etcds://{}?ca={ca}", plain.address()),
        &["does not speak TLS", "etcd://"],
    )?;
    Ok(8)
}

/// Keys and authorities that others can read or write are not used.
fn guarded(etcd: &Etcd, tls: &Tls) -> Result<()> {
    let chmod = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("change a mode")
    };
    for (path, bad, good, word) in [
        (&tls.client.key, 0o640, 0o600, "chmod 600"),
        (&tls.ca, 0o664, 0o644, "chmod go-w"),
        (&tls.client.cert, 0o646, 0o644, "chmod go-w"),
    ] {
        chmod(path, bad)?;
        let refused = turned_away(&etcd.place(), &[&format!("{bad:04o}"), word]);
        chmod(path, good)?;
        refused?;
    }
    etcd.arbiter("guarded")?.read()?;
    Ok(())
}

/// Says this to etcd's gateway, as a client with a certificate.
fn post(etcd: &Etcd, tls: &Tls, path: &str, body: &str) -> Result<String> {
    let script = "import ssl,sys,urllib.request as u\n\
                  url,ca,cert,key,body=sys.argv[1:]\n\
                  c=ssl.create_default_context(cafile=ca); c.load_cert_chain(cert,key)\n\
                  print(u.urlopen(u.Request(url,body.encode()),context=c,timeout=10).read().decode())";
    let output = Command::new("python3")
        .args(["-c", script, &format!("https://{}{path}", etcd.address())])
        .args([&tls.ca, &tls.client.cert, &tls.client.key])
        .arg(body)
        .output()
        .context("start python3")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{path}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// An etcd that has users: this one by the right password, and nobody else.
fn users(etcd: &Etcd, files: &Path, tls: &Tls) -> Result<()> {
    for (path, body) in [
        (
            "/v3/auth/user/add",
            r#"{"name":"root","password":"over all"}"#,
        ),
        ("/v3/auth/role/add", r#"{"name":"root"}"#),
        ("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#),
        (
            "/v3/auth/user/add",
            r#"{"name":"doppel","password":"a word"}"#,
        ),
        ("/v3/auth/role/add", r#"{"name":"doppel"}"#),
        (
            "/v3/auth/role/grant",
            // From "doppel/" to before "doppel0".
            r#"{"name":"doppel","perm":{"permType":2,"key":"ZG9wcGVsLw==","range_end":"ZG9wcGVsMA=="}}"#,
        ),
        (
            "/v3/auth/user/grant",
            r#"{"user":"doppel","role":"doppel"}"#,
        ),
        (
            "/v3/auth/user/add",
            r#"{"name":"idle","password":"a word"}"#,
        ),
        ("/v3/auth/enable", "{}"),
    ] {
        post(etcd, tls, path, body)?;
    }
    let password = files.join("password");
    let write = |text: &str, mode: u32| -> Result<()> {
        fs::write(&password, text).context("write a password")?;
        fs::set_permissions(&password, fs::Permissions::from_mode(mode)).context("change a mode")
    };
    let place = |user: &str| {
        format!(
            "{}&user={user}&password={}",
            etcd.place(),
            password.display()
        )
    };
    write("a word\n", 0o644)?;
    turned_away(&place("doppel"), &["0644", "chmod 600"])?;
    write("a word\n", 0o600)?;
    turned_away(&etcd.place(), &["wants a user and a password", "user=NAME"])?;
    let (ca, cert, key) = (
        tls.ca.display(),
        tls.named.cert.display(),
        tls.named.key.display(),
    );
    turned_away(
        &format!("etcds://{}?ca={ca}&cert={cert}&key={key}", etcd.address()),
        &["with a common name", "openssl req"],
    )?;
    turned_away(&place("idle"), &["may not do that", "grant-permission"])?;
    turned_away(&place("nobody"), &["does not know the user"])?;
    let sealed = |machine: &str| -> Result<Box<dyn Arbiter>> {
        // The machines of before have records.
        let machine = format!("user-{machine}");
        Ok(Box::new(arbiter_at(&place("doppel"), &machine)?))
    };
    arbiter_rules::check(&sealed, 2, 5).context("as a user")?;
    write("another word\n", 0o600)?;
    turned_away(&place("doppel"), &["does not know the user"])
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
