//! Namespaces, nodes, shards, regions and links, in the messages of the protocol.

use crate::client::{Client, Plan};
use crate::error::{Error, Result};
use crate::retry::Safety;
use crate::router::Target;
use tombolo_proto::v1;
use tombolo_proto::v1::cluster_service_client::ClusterServiceClient;
use tombolo_proto::v1::namespace_service_client::NamespaceServiceClient;
use tombolo_proto::v1::region_service_client::RegionServiceClient;

const PAGE_SIZE: i32 = 1000;

/// Administration through any node. Cheap to clone.
///
/// Listings are repeated when no node answers. Changes carry no request id, so they are repeated
/// only when a node certainly did nothing.
///
/// ```no_run
/// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
/// use tombolo_client::proto::Rule;
///
/// let admin = client.admin();
/// admin.create_namespace("carts", Rule::Siblings).await?;
/// for namespace in admin.list_namespaces().await? {
///     println!("{} has the rule {:?}", namespace.name, namespace.rule());
/// }
/// for region in admin.list_regions().await?.regions {
///     println!("{} is {:?}, {:.1} s behind", region.name, region.state(), region.lag_seconds);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Admin {
    client: Client,
}

/// One unary call.
macro_rules! ask {
    ($admin:expr, $safety:expr, $service:ident, $method:ident, $request:expr) => {
        $admin
            .client
            .call($admin.plan($safety), $request, |channel, request| async move {
                $service::new(channel).$method(request).await
            })
            .await
    };
}

impl Admin {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    fn plan(&self, safety: Safety) -> Plan {
        let deadline = self.client.deadline(None);
        Plan { target: Target::AnyNode, safety, deadline, waits: safety == Safety::Once }
    }

    /// The region's status and topology.
    ///
    /// # Errors
    /// As any read.
    pub async fn cluster(&self) -> Result<v1::GetClusterResponse> {
        ask!(self, Safety::Read, ClusterServiceClient, get_cluster, v1::GetClusterRequest {})
    }

    /// The region's nodes with their health.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_nodes(&self) -> Result<Vec<v1::Node>> {
        let request = v1::ListNodesRequest {};
        Ok(ask!(self, Safety::Read, ClusterServiceClient, list_nodes, request)?.nodes)
    }

    /// The region's shards as one node sees them.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_shards(&self) -> Result<Vec<v1::Shard>> {
        let request = v1::ListShardsRequest {};
        Ok(ask!(self, Safety::Read, ClusterServiceClient, list_shards, request)?.shards)
    }

    /// All regions as this one sees them. `unreachable` names nodes that did not contribute.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_regions(&self) -> Result<v1::ListRegionsResponse> {
        ask!(self, Safety::Read, RegionServiceClient, list_regions, v1::ListRegionsRequest {})
    }

    /// One region.
    ///
    /// # Errors
    /// [`Error::NotFound`], or as any read.
    pub async fn get_region(&self, name: impl Into<String>) -> Result<v1::Region> {
        let request = v1::GetRegionRequest { name: name.into() };
        let reply = ask!(self, Safety::Read, RegionServiceClient, get_region, request)?;
        reply.region.ok_or_else(|| Error::protocol("no region in the reply"))
    }

    /// The links over which this region pulls; `None` for those with every region.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_links(&self, peer_region: Option<&str>) -> Result<v1::ListLinksResponse> {
        let peer_region = peer_region.unwrap_or_default().to_owned();
        let request = v1::ListLinksRequest { peer_region };
        ask!(self, Safety::Read, RegionServiceClient, list_links, request)
    }

    /// The deletions that are kept until every region has them; `None` for all namespaces.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_tombstones(
        &self,
        namespace: Option<&str>,
    ) -> Result<v1::ListTombstonesResponse> {
        let namespace = namespace.unwrap_or_default().to_owned();
        let request = v1::ListTombstonesRequest { namespace };
        ask!(self, Safety::Read, RegionServiceClient, list_tombstones, request)
    }

    /// Stops pulling from `peer_region` until it is resumed, also over restarts.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn pause_link(&self, peer_region: impl Into<String>) -> Result<()> {
        let request = v1::PauseLinkRequest { peer_region: peer_region.into() };
        ask!(self, Safety::Read, RegionServiceClient, pause_link, request).map(drop)
    }

    /// Pulls from `peer_region` again.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn resume_link(&self, peer_region: impl Into<String>) -> Result<()> {
        let request = v1::ResumeLinkRequest { peer_region: peer_region.into() };
        ask!(self, Safety::Read, RegionServiceClient, resume_link, request).map(drop)
    }

    /// Bounds what each node of the region takes from `peer_region`; 0 for no limit.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn limit_link(
        &self,
        peer_region: impl Into<String>,
        bytes_per_second: u64,
    ) -> Result<()> {
        let request = v1::LimitLinkRequest { peer_region: peer_region.into(), bytes_per_second };
        ask!(self, Safety::Read, RegionServiceClient, limit_link, request).map(drop)
    }

    /// Asks the region to take over, now, whatever `peer_region` has and it lacks; `None` for all
    /// namespaces. Progress is in the links.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn start_repair(
        &self,
        peer_region: impl Into<String>,
        namespace: Option<&str>,
    ) -> Result<v1::StartRepairResponse> {
        let namespace = namespace.unwrap_or_default().to_owned();
        let request = v1::StartRepairRequest { peer_region: peer_region.into(), namespace };
        ask!(self, Safety::Read, RegionServiceClient, start_repair, request)
    }

    /// The keys of a namespace that the region and `peer_region` hold differently, at most `limit`
    /// in each shard.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_differences(
        &self,
        peer_region: impl Into<String>,
        namespace: impl Into<String>,
        limit: u32,
    ) -> Result<v1::ListDifferencesResponse> {
        let (peer_region, namespace) = (peer_region.into(), namespace.into());
        let request = v1::ListDifferencesRequest { peer_region, namespace, limit };
        ask!(self, Safety::Read, RegionServiceClient, list_differences, request)
    }

    /// Admits a region: a new one with its `number`, or one that was fenced (0 then). It gets its data
    /// from the others; [`list_regions`](Self::list_regions), asked there, says how far it is.
    ///
    /// # Errors
    /// [`Error::Precondition`] while another region joins, or not in the catalog's home region;
    /// otherwise as any write. Repeating is harmless.
    pub async fn add_region(
        &self,
        name: impl Into<String>,
        number: u32,
        link_addresses: Vec<String>,
    ) -> Result<Option<v1::Region>> {
        let request = v1::AddRegionRequest { name: name.into(), number, link_addresses };
        let reply = ask!(self, Safety::Read, RegionServiceClient, add_region, request)?;
        Ok(reply.region)
    }

    /// Lets the others go on without a region, until it is added again.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn fence_region(&self, name: impl Into<String>) -> Result<Option<v1::Region>> {
        let request = v1::FenceRegionRequest { name: name.into() };
        let reply = ask!(self, Safety::Read, RegionServiceClient, fence_region, request)?;
        Ok(reply.region)
    }

    /// Lets the others go on without a region for good.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn remove_region(&self, name: impl Into<String>) -> Result<Option<v1::Region>> {
        let request = v1::RemoveRegionRequest { name: name.into() };
        let reply = ask!(self, Safety::Read, RegionServiceClient, remove_region, request)?;
        Ok(reply.region)
    }

    /// Gives a region a new incarnation, because its data is older than what it told others.
    ///
    /// # Errors
    /// [`Error::Precondition`] while another region joins; otherwise as any write. Not to be repeated
    /// without looking: once recovered, it would be recovered again.
    pub async fn recover_region(&self, name: impl Into<String>) -> Result<Option<v1::Region>> {
        let request = v1::RecoverRegionRequest { name: name.into() };
        let reply = ask!(self, Safety::Once, RegionServiceClient, recover_region, request)?;
        Ok(reply.region)
    }

    /// Values that only this region had when it was fenced; `None` for all namespaces, at most
    /// `limit` in each shard.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_reviews(
        &self,
        namespace: Option<&str>,
        limit: u32,
    ) -> Result<v1::ListReviewsResponse> {
        let namespace = namespace.unwrap_or_default().to_owned();
        let request = v1::ListReviewsRequest { namespace, limit };
        ask!(self, Safety::Read, RegionServiceClient, list_reviews, request)
    }

    /// Forgets such values.
    ///
    /// # Errors
    /// As any write; repeating is harmless.
    pub async fn dismiss_reviews(
        &self,
        namespace: impl Into<String>,
        reviews: Vec<v1::Review>,
    ) -> Result<v1::DismissReviewsResponse> {
        let request = v1::DismissReviewsRequest { namespace: namespace.into(), reviews };
        ask!(self, Safety::Read, RegionServiceClient, dismiss_reviews, request)
    }

    /// The writes that exist only in this region; `None` for all namespaces. Lists at most `limit`
    /// in each shard and counts all.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_at_risk(
        &self,
        namespace: Option<&str>,
        limit: u32,
    ) -> Result<v1::ListAtRiskResponse> {
        let namespace = namespace.unwrap_or_default().to_owned();
        let request = v1::ListAtRiskRequest { namespace, limit };
        ask!(self, Safety::Read, RegionServiceClient, list_at_risk, request)
    }

    /// The Merkle root of each shard of a namespace, with what is applied there.
    ///
    /// # Errors
    /// As any read.
    pub async fn summarize_namespace(
        &self,
        name: impl Into<String>,
    ) -> Result<v1::SummarizeNamespaceResponse> {
        let request = v1::SummarizeNamespaceRequest { namespace: name.into() };
        ask!(self, Safety::Read, RegionServiceClient, summarize_namespace, request)
    }

    /// Creates a namespace in every region.
    ///
    /// # Errors
    /// [`Error::Precondition`] if the name is taken; [`Error::Unavailable`] if the catalog's home
    /// region cannot be reached.
    pub async fn create_namespace(
        &self,
        name: impl Into<String>,
        rule: v1::Rule,
    ) -> Result<v1::Namespace> {
        let namespace =
            v1::Namespace { name: name.into(), rule: rule.into(), ..Default::default() };
        let request =
            v1::CreateNamespaceRequest { namespace: Some(namespace), validate_only: false };
        let reply = ask!(self, Safety::Once, NamespaceServiceClient, create_namespace, request)?;
        reply.namespace.ok_or_else(|| Error::protocol("no namespace in the reply"))
    }

    /// Creates a namespace in every region in which concurrent values wait for somebody to settle them: for
    /// `hold`, from when the latest of them was written; then that one is taken.
    ///
    /// # Errors
    /// As [`create_namespace`](Self::create_namespace).
    pub async fn create_held_namespace(
        &self,
        name: impl Into<String>,
        hold: std::time::Duration,
    ) -> Result<v1::Namespace> {
        let namespace = v1::Namespace {
            name: name.into(),
            rule: v1::Rule::Siblings.into(),
            hold: Some(crate::types::proto_duration(hold)),
            ..Default::default()
        };
        let request =
            v1::CreateNamespaceRequest { namespace: Some(namespace), validate_only: false };
        let reply = ask!(self, Safety::Once, NamespaceServiceClient, create_namespace, request)?;
        reply.namespace.ok_or_else(|| Error::protocol("no namespace in the reply"))
    }

    /// One namespace.
    ///
    /// # Errors
    /// [`Error::NotFound`], or as any read.
    pub async fn get_namespace(&self, name: impl Into<String>) -> Result<v1::Namespace> {
        let request = v1::GetNamespaceRequest { name: name.into() };
        let reply = ask!(self, Safety::Read, NamespaceServiceClient, get_namespace, request)?;
        reply.namespace.ok_or_else(|| Error::protocol("no namespace in the reply"))
    }

    /// All namespaces, in order of their names.
    ///
    /// # Errors
    /// As any read.
    pub async fn list_namespaces(&self) -> Result<Vec<v1::Namespace>> {
        let mut namespaces = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListNamespacesRequest { page_size: PAGE_SIZE, page_token };
            let reply = ask!(self, Safety::Read, NamespaceServiceClient, list_namespaces, request)?;
            namespaces.extend(reply.namespaces);
            page_token = reply.next_page_token;
            if page_token.is_empty() {
                return Ok(namespaces);
            }
        }
    }

    /// Deletes a namespace with all its keys, in every region. With an `etag`, only if that is
    /// still current.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Precondition`] for another etag, or [`Error::Unavailable`].
    pub async fn delete_namespace(
        &self,
        name: impl Into<String>,
        etag: Option<String>,
    ) -> Result<()> {
        let request =
            v1::DeleteNamespaceRequest { name: name.into(), etag: etag.unwrap_or_default() };
        ask!(self, Safety::Once, NamespaceServiceClient, delete_namespace, request)?;
        Ok(())
    }
}
